"""The bench: what a Service costs here, beside nftables and iptables rule sets of the same Services (`make bench`)."""
