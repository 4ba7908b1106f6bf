# docker build -t cody . && docker run --rm -v "$PWD/runs:/cody/runs" cody --save_tb     (with GPUs: --gpus all)
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends libegl1 libopengl0 libgl1-mesa-dri && rm -rf /var/lib/apt/lists/*
WORKDIR /cody
COPY requirements.txt .
# as in the Makefile: older versions of pip search for hours among these requirements
RUN pip install --no-cache-dir pip==26.3 && pip install --no-cache-dir -r requirements.txt
COPY . .
ENTRYPOINT ["python", "train.py"]
