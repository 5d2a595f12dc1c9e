"""The container image, built and started as the DaemonSet starts it: `make image-test`. Not part of `make test`."""
