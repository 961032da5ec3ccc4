"""Settings of Ray: `[cluster]`."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from stare_megatron.config.base import Section, Text, explained


class ClusterConfig(Section):
    address: Text = Field(
        default="local", description="`local` starts Ray on this machine; `auto` or HOST:PORT joins a cluster."
    )
    port: int = Field(
        default=0, ge=0, le=65535, description="TCP port where trainer ranks meet, on rank 0's node; 0: a free one."
    )
    object_store_mb: int = Field(default=512, ge=80, description="Object store of a local Ray, MB.")
    start_timeout: float = Field(
        default=0.0,
        ge=0,
        description="Seconds to wait for the next rank or engine to be ready; 0: 600, and 1 for each 100 MB of the "
        "model's weights.",
    )

    @field_validator("address")
    @classmethod
    def _form(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        named = host and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536
        with explained():
            if address not in ("local", "auto") and not named:
                raise ValueError("must be `local`, `auto` or HOST:PORT")
        return address

    @model_validator(mode="after")
    def _local(self) -> ClusterConfig:
        if self.address != "local" and self.object_store_mb != type(self).model_fields["object_store_mb"].default:
            raise ValueError(
                f'object_store_mb = {self.object_store_mb} is for address = "local"; a cluster has its own, set where '
                "Ray is started"
            )
        return self
