# The agent's image. Debian 13 for its BCC (0.31, LLVM 19); nothing else in it compiles.
#
#   docker build -t ebproxy .          (or podman, or buildah)
#
# BASE_IMAGE may be any Debian 13. An index or an authority of your own for pip goes in as build secrets, which leave no
# trace in the image: --secret id=pip.conf,src=FILE --secret id=pip.ca,src=FILE (pip.conf: cert = /run/secrets/pip.ca).
ARG BASE_IMAGE=debian:trixie-slim

FROM ${BASE_IMAGE} AS builder
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates
WORKDIR /opt/ebproxy
COPY pyproject.toml requirements.lock /build/
# The lock also pins what development needs: it constrains, and pyproject.toml says what the agent itself imports.
RUN python3 -c 'import tomllib; print(*tomllib.load(open("/build/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > /build/requirements.txt \
    && python3 -m venv --system-site-packages venv
# kubernetes.aio is the client once more, for asyncio: 64 MB that nothing imports.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=pip.ca,target=/run/secrets/pip.ca \
    venv/bin/pip install --no-cache-dir --only-binary :all: --no-compile \
        --constraint /build/requirements.lock --requirement /build/requirements.txt \
    && venv/bin/pip check \
    && venv/bin/pip freeze --local > requirements.installed \
    && venv/bin/pip uninstall --yes pip \
    && rm -r venv/lib/python3*/site-packages/kubernetes/aio
COPY agent agent
COPY bpf bpf
# The agent looks for bpf/ beside its package, so the package stays here, and the environment is told where.
# Byte code is made now: the root file system is read-only in the DaemonSet.
RUN echo /opt/ebproxy > "$(echo venv/lib/python3*/site-packages)/ebproxy.pth" \
    && printf '%s\n' '#!/opt/ebproxy/venv/bin/python3' 'import sys' 'from agent.__main__ import main' 'sys.exit(main())' \
        > venv/bin/ebproxy \
    && chmod 0755 venv/bin/ebproxy \
    && venv/bin/python3 -m compileall -q venv/lib agent

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="ebproxy" \
      org.opencontainers.image.description="A Kubernetes Service dataplane in eBPF" \
      org.opencontainers.image.licenses="Apache-2.0 AND (Apache-2.0 OR GPL-2.0-only)"
# nftables and iptables are for `ebproxy doctor`: it looks for the rules a kube-proxy left. `mount` is for nodes without
# a bpffs (manifests/components/mount-bpffs).
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-bpfcc nftables iptables mount \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* /usr/share/doc/* /usr/share/man/*
COPY LICENSE* /opt/ebproxy/
COPY --from=builder /opt/ebproxy /opt/ebproxy
RUN ln -s /opt/ebproxy/venv/bin/ebproxy /usr/local/bin/ebproxy
ENTRYPOINT ["ebproxy"]
CMD ["run"]
