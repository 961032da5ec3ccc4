"""From a run's file to a job: Slurm, KubeRay, `ray job submit`, this machine."""
