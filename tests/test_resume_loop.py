"A run that is killed and continued ends in the same bits as one that was not."
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent/'resume_driver.py'

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('runs')

def drive(folder, *args, hash_seed='0'):
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONHASHSEED=hash_seed)
    p = subprocess.run([sys.executable, str(DRIVER), args[0], str(folder), *map(str, args[1:])], capture_output=True, text=True, env=env)
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-4000:]
    return p.stdout + p.stderr

@pytest.mark.parametrize('kind, steps', [('mixture', [0]), ('mixture', [1]), ('mixture', [5, 10]), ('long', [7]), ('chats', [4, 8, 11]), ('packed', [3, 8]), ('token', [7, 10]), ('full', [8]), ('broken', [7, 10])])
def test_killed_at_a_step(folder, kind, steps): drive(folder, 'killed_at', kind, *steps, hash_seed=str(len(steps)))

def test_killed_while_saving(folder): drive(folder, 'killed_while_saving')

@pytest.mark.parametrize('name', ['__0_0.distcp', '.metadata', 'state.json'])
def test_truncated_checkpoint_falls_back(folder, name):
    out = drive(folder, 'truncated', name)
    assert 'damaged checkpoint passed over' in out and name in out

def test_terminated_by_a_scheduler(folder): drive(folder, 'terminated')

def test_killed_by_the_clock(folder): drive(folder, 'killed_anytime')
