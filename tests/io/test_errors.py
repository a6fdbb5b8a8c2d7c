"""Errors that a user can mend: their text, their journey between processes, and what else they are."""

import pickle

import pytest

from speechdistill.commands.promote import PromotionError
from speechdistill.io import errors
from speechdistill.io.errors import AudioError, MissingError, UserError
from speechdistill.tracking.mlflow_sender import TrackingError
from speechdistill.tracking.registry import RegistryError

ALSO = {
    errors.UserError: ValueError,
    errors.TableError: ValueError,
    errors.StorageError: OSError,
    errors.RunError: RuntimeError,
    errors.LibraryError: ImportError,
    errors.WeightsError: FileNotFoundError,
    PromotionError: ValueError,
    RegistryError: RuntimeError,
    TrackingError: RuntimeError,
}


@pytest.mark.parametrize(("kind", "also"), ALSO.items())
def test_an_error_has_a_reason_and_a_fix_in_every_process(kind: type[UserError], also: type[Exception]) -> None:
    error = kind("--seed is -1", "give at least 0")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert type(one) is kind and isinstance(one, UserError) and isinstance(one, also)
        assert (one.reason, one.fix) == ("--seed is -1", "give at least 0")
        assert str(one) == "--seed is -1; give at least 0"
    with pytest.raises(TypeError):
        kind("no fix")  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [AudioError, errors.UnreadableError])
def test_an_audio_error_names_its_file_in_every_process(kind: type[AudioError]) -> None:
    error = kind("a/b.wav", "empty", "leave it out")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert type(one) is kind and isinstance(one, UserError)
        assert (one.path, one.reason, one.fix) == ("a/b.wav", "empty", "leave it out")
        assert str(one) == "'a/b.wav': empty; leave it out"


def test_a_missing_asset_knows_its_components_in_every_process() -> None:
    error = MissingError("lacks:\n  codec\n", "leave it out", ("codecs.encodec",))
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert str(one) == "lacks:\n  codec\nleave it out"
        assert one.components == ("codecs.encodec",)
    assert MissingError("a", "b").components == ()
