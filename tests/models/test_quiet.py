"""Loading is quiet where nobody watches, and leaves other libraries as they were."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from pic_rag.models.quiet import quiet_loading


@pytest.fixture(scope="module")
def folders(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A model, and a reader for it."""
    base = tmp_path_factory.mktemp("base")
    tiny_model.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    reader = tmp_path_factory.mktemp("reader")
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(str(reader))
    return base, reader


@pytest.mark.slow
def test_loading_a_generator_with_its_reader_writes_nothing_outside_a_terminal(folders):
    base, reader = folders
    code = f"from pic_rag import Generator; Generator.from_pretrained({str(base)!r}, reader={str(reader)!r})"
    done = subprocess.run([sys.executable, "-W", "default::FutureWarning", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_transformers_draws_its_bars_again_afterwards(folders, capfd):
    transformers_logging.enable_progress_bar()  # another library may have switched them off for the whole process
    with quiet_loading():
        AutoModelForCausalLM.from_pretrained(folders[0])
    assert capfd.readouterr().err == ""
    AutoModelForCausalLM.from_pretrained(folders[0])
    assert "Loading weights" in capfd.readouterr().err


def test_a_hook_and_warnings_of_the_users_own_come_back_even_after_an_error():
    def own(factory, args, kwargs):
        return factory(*args, **kwargs)

    before = transformers_logging.set_tqdm_hook(own)
    try:
        with pytest.raises(OSError, match="no such model"), quiet_loading():
            raise OSError("no such model")
        with pytest.warns(FutureWarning, match="soon"):
            warnings.warn("soon", FutureWarning, stacklevel=1)
    finally:
        assert transformers_logging.set_tqdm_hook(before) is own


def test_threads_that_load_at_once_leave_nothing_behind():
    def load():
        for _ in range(50):
            with quiet_loading():
                pass

    threads = [threading.Thread(target=load) for _ in range(8)]
    filters = list(warnings.filters)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert transformers_logging.set_tqdm_hook(None) is None
    assert list(warnings.filters) == filters
