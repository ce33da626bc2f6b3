"""The profiler's routes; that ranks write traces is tested with a server."""

import pytest

from fake_engine import Api
from nibble.ipc.messages import StartProfile


@pytest.fixture
def api() -> Api:
    return Api()


def test_a_profile_is_started_with_what_was_asked_for_and_stopped(api):
    body = {
        "output_dir": "here",
        "profile_id": "mine",
        "num_steps": 3,
        "activities": ["CPU", "GPU"],
        "with_stack": True,
        "record_shapes": True,
        "start_step": None,
        "profile_by_stage": False,
        "merge_profiles": False,
    }
    assert api.result("/start_profile", body) == {"profile_id": "mine"}
    assert api.engine.profiles == [StartProfile("here", "mine", 3, ("CPU", "GPU"), True, True)]
    assert api.result("/stop_profile", {}) == {"traces": ["mine.trace"]}
    assert api.error("/stop_profile", {})["message"] == "no profile was started"


def test_no_body_asks_for_the_defaults(api):
    assert api.request("POST", "/start_profile").status_code == 200
    (profile,) = api.engine.profiles
    assert (profile.folder, profile.activities, profile.num_steps) == (".", ("CPU",), None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"profile_id": "../x"}, "profile_id"),
        ({"num_steps": 0}, "num_steps"),
        ({"activities": ["DISK"]}, "activities.0"),
        ({"activities": []}, "activities"),
        ({"start_step": 5}, "start_step"),
        ({"profile_by_stage": True}, "profile_by_stage"),
    ],
)
def test_what_can_not_be_recorded_is_refused(api, fields, param):
    assert api.error("/start_profile", fields)["param"] == param
    assert not api.engine.profiles
