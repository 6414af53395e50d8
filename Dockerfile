# Build: docker build -t kvbits .
# Run:   docker run -p 8000:8000 -v ~/.cache/huggingface:/home/kvbits/.cache/huggingface kvbits serve MODEL --host 0.0.0.0
FROM python:3.12-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE constraints.txt ./
COPY csrc csrc
COPY src src
# torch for the CPU alone: the default index brings gigabytes of libraries for GPUs. Give another index for those.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/kvbits \
 && /opt/kvbits/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
 && /opt/kvbits/bin/pip install --no-cache-dir -c constraints.txt '.[server]'

FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 kvbits
COPY --from=build /opt/kvbits /opt/kvbits
ENV PATH=/opt/kvbits/bin:$PATH PYTHONUNBUFFERED=1
USER kvbits
WORKDIR /home/kvbits
EXPOSE 8000
# The process must see the signal itself to end its requests in peace.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5m \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["kvbits"]
CMD ["--help"]
