"""What a run was made with is recorded, and what has changed since is named."""

import copy

from pgps_jax.report.environment import differences, environment


def test_the_environment_tells_versions_device_and_command():
    found = environment()
    assert found["packages"]["jax"] and found["devices"] and found["python"] and "command" in found
    assert differences(found, environment()) == []


def test_what_has_changed_is_named_with_both_values_and_the_time_is_not():
    then, now = environment(), environment()
    now = copy.deepcopy(now) | {"time": "later", "command": "other", "cores": 64, "devices": ["gpu H200"] * 2}
    now["packages"]["jax"], now["packages"]["scipy"] = "99", None
    changes = differences(then, now)
    assert len(changes) == 4
    assert any(change == f"jax {then['packages']['jax']} then, 99 now" for change in changes)
    assert any("2 x gpu H200 now" in change for change in changes) and any("scipy" in change and "none now" in change for change in changes)
