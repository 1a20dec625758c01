FROM python:3.13-slim
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt && python -m compileall -q /usr/local/lib/python3.13/site-packages
COPY llmchat.py LICENSE ./
COPY migrations migrations
COPY web web
RUN python -m compileall -q llmchat.py && useradd --system --uid 10001 llmchat && mkdir /data && chown llmchat /data
USER llmchat
VOLUME /data
EXPOSE 8000
ENV LLMCHAT_HOST=0.0.0.0 LLMCHAT_DB=/data/llmchat.db
HEALTHCHECK --interval=30s --timeout=3s --start-period=5s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/api/v1/health', timeout=2)"]
CMD ["python", "-m", "llmchat"]
