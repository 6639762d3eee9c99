"""What scripts of this folder share: paired timings, logs that go on, networks on the meta device, tables."""
