"""What a person writes about a worker is checked when it is read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from redshard.worker.configuration import WorkerConfiguration


def test_defaults():
    configuration = WorkerConfiguration()
    assert configuration.pool.segment_bytes == 1 << 30
    assert configuration.pool.alignment == 4096
    assert configuration.pool.readback == "probe"
    assert configuration.upload.sync_bytes == 256 << 20


def test_sizes_as_text_and_as_numbers():
    pool = WorkerConfiguration.model_validate({"pool": {"segment_bytes": "2.5GiB", "alignment": 65536}}).pool
    assert (pool.segment_bytes, pool.alignment) == (5 << 29, 65536)


@pytest.mark.parametrize(
    ("values", "where", "why"),
    [
        ({"pool": {"alignment": 3000}}, "pool.alignment", "power of two"),
        ({"pool": {"alignment": 128}}, "pool.alignment", "256"),
        ({"pool": {"segment_bytes": 0}}, "pool.segment_bytes", "greater than or equal"),
        ({"pool": {"segment_bytes": "-1GiB"}}, "pool.segment_bytes", "byte"),
        ({"pool": {"segment_bytes": "huge"}}, "pool.segment_bytes", "byte"),
        ({"pool": {"segment_size": "1GiB"}}, "pool.segment_size", "not permitted"),
        ({"pool": {"readback": "sometimes"}}, "pool.readback", "probe"),
        ({"upload": {"staging_buffers": 1}}, "upload.staging_buffers", "2"),
        ({"upload": {"sync_bytes": "1KiB"}}, "upload.sync_bytes", "4096"),
        ({"deadlines": {"step_s": 0}}, "deadlines.step_s", "greater than 0"),
        ({"deadlines": {"copy_s": float("nan")}}, "deadlines.copy_s", "finite"),
    ],
)
def test_bad_values_are_named(values, where, why):
    with pytest.raises(ValidationError) as caught:
        WorkerConfiguration.model_validate(values)
    (error,) = caught.value.errors()
    assert ".".join(map(str, error["loc"])) == where
    assert why in error["msg"]


def test_settings_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        WorkerConfiguration().pool.alignment = 512
