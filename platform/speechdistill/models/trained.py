"""Our own models as teachers, by the address of a checkpoint or of a model in MLflow."""

from speechdistill.models import architectures
from speechdistill.models.options import TeacherOptions
from speechdistill.models.windowed import WindowScorer
from speechdistill.tracking import registry


def load(address: str, options: TeacherOptions) -> WindowScorer:
    """Load a student or a head at an address of `registry.student_folder`.

    The weights in `options` are a head's encoder. Raises `RegistryError` or `TableError` naming what is missing, and
    the errors of `architectures.scorer`.
    """
    options.only("student")
    with registry.student_folder(address) as folder:
        return architectures.scorer(folder, options)
