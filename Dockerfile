# What a node of a cluster runs (kuberay.yaml). The project's code is not in it: it travels with each job.
#   docker build --tag REGISTRY/speechdistill:ray2.60.0-py311-cpu .
#   docker build --tag REGISTRY/speechdistill:ray2.60.0-py311-cuda --build-arg PIP_EXTRA_INDEX_URL= .
FROM python:3.11-slim-bookworm

# Read by pip: where torch's CPU build comes from. Without it torch is the build with CUDA; the driver is the node's.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

# wget is for KubeRay's health probes. The wheels bring libsndfile, FFmpeg and OpenMP along.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

COPY requirements.lock /opt/speechdistill/
RUN pip install --no-cache-dir --requirement /opt/speechdistill/requirements.lock
# Without its dependencies: it asks for torchaudio, and only its weights file is used.
RUN pip install --no-cache-dir --no-deps distillmos==0.9.1
# For a working_dir on S3; the lock pins its botocore.
RUN pip install --no-cache-dir --constraint /opt/speechdistill/requirements.lock boto3

RUN useradd --create-home --uid 1000 ray
USER 1000
WORKDIR /home/ray
