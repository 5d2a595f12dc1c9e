"""A cluster on one machine: nodes and pods as network namespaces and cgroups, with real servers, clients and agents."""
