"""What MuJoCo remarks on models: Python warnings, and its own handler back afterwards."""

import gymnasium
import pytest

from flame_ext.envs import make_eval_env


def test_mujoco_remarks_on_models_are_python_warnings(monkeypatch, tmp_path):
    mujoco = pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)
    said = []
    mujoco.set_mju_user_warning(said.append)
    try:
        make, spec = gymnasium.make, gymnasium.spec("Reacher-v5")

        def remarking(*args, **kwargs):
            mujoco.get_mju_user_warning()("the integrator is deprecated")
            mujoco.get_mju_user_warning()("the mass is odd")
            return make(*args, **kwargs)

        monkeypatch.setattr(gymnasium, "make", remarking)
        for source in ("Reacher-v5", make(spec)):
            with (
                pytest.warns(UserWarning, match="^Reacher-v5: the mass is odd"),
                pytest.warns(DeprecationWarning, match="^Reacher-v5: the integrator is deprecated"),
            ):
                make_eval_env(source)
        mujoco.get_mju_user_warning()("the simulation is unstable")
        assert said == ["the simulation is unstable"], "MuJoCo's own handler is not back"
    finally:
        mujoco.set_mju_user_warning(None)
