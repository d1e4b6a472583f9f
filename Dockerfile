# docker build -t llava-llama31 . ; docker run --gpus all -v $PWD:/data -w /data llava-llama31 train mine.yaml
# The base is pinned by its tag; for a build that never changes, pin its digest: docker buildx imagetools inspect IMAGE.
FROM python:3.11.14-slim-trixie
COPY . /src
# PyPI's torch is built for CUDA; constraints.txt names the CPU build
RUN grep -v '^torch==' /src/constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt "torch==$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' /src/constraints.txt)" \
    && pip install --no-cache-dir -c /tmp/constraints.txt '/src[demo,peft,low-bit]'
ENTRYPOINT ["llava-llama31"]
