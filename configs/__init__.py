"""Ready files: settings for jobs, and descriptions of models and hardware. Installed as `seqpar_ring.data`."""
