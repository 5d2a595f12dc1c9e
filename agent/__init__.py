"""ebproxy: a Kubernetes Service dataplane in eBPF."""

__version__ = "0.1.0"
