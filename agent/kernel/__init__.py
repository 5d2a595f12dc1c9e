"""Everything that touches the kernel: bpf(2), maps, links, cgroups."""
