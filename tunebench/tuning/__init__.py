"""Ray Tune: runner, per-arm ASHA, samplers and the recording of results."""
