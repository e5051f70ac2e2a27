"""Containerfile and compose.yaml of a bundle: the student behind `compress serve`, in an image of
Python alone, as a user without rights, watched by /healthz.
"""

from compress import __version__

CONTAINERFILE, COMPOSE = "Containerfile", "compose.yaml"
PORT = 8080
USER = 10001
EXTRAS = "accept,serve"


def containerfile() -> str:
    """To build in the bundle's folder. Nothing but the bundle and one package is in the image."""
    health = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{PORT}/healthz', timeout=3)"
    return f"""\
FROM docker.io/library/python:3.12-slim
ARG PACKAGE="compress-lm[{EXTRAS}]=={__version__}"
RUN pip install --no-cache-dir --root-user-action=ignore "$PACKAGE"
RUN useradd --uid {USER} --no-create-home --shell /usr/sbin/nologin student
COPY --chown=root:root . /bundle
RUN compress verify /bundle
USER {USER}
WORKDIR /tmp
EXPOSE {PORT}
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \\
  CMD ["python", "-c", "{health}"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["compress", "serve", "/bundle", "--host", "0.0.0.0", "--port", "{PORT}"]
"""


def compose() -> str:
    """One service on loopback. Its key is COMPRESS_KEY of the environment, and has no default."""
    return f"""\
services:
  student:
    build:
      context: .
      dockerfile: {CONTAINERFILE}
    environment:
      COMPRESS_KEY: ${{COMPRESS_KEY:?a key of at least 16 characters}}
    ports:
      - "127.0.0.1:{PORT}:{PORT}"
    read_only: true
    tmpfs:
      - /tmp
    cap_drop:
      - ALL
    security_opt:
      - no-new-privileges:true
    restart: unless-stopped
    stop_grace_period: 30s
"""
