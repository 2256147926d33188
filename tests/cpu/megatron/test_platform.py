"""The CPU in CUDA's place: twice, in further threads, and not outside of what asked for it."""

import helpers
import pytest


def uses_cuda() -> tuple:
    """What Megatron does in its many ways; raises where CUDA is really asked for."""
    import torch

    made = torch.empty(3, device="cuda"), torch.zeros(2, device=torch.cuda.current_device()), torch.ones(2).cuda()
    moved = torch.ones(2).to("cuda")
    return {x.device.type for x in (*made, moved)}, torch.ones(2).type()


def drive(rank, world, init) -> dict:
    import threading

    import torch

    from hybridrl.megatron import platform

    found, results = {}, {}

    def in_thread(name: str, activate: bool) -> None:
        def work():
            try:
                if activate:
                    platform.activate("cpu")
                results[name] = uses_cuda()
            except Exception as error:
                results[name] = type(error).__name__

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    found["devices"] = [platform.activate("cpu"), platform.activate("cpu")]
    found["patched"] = torch.cuda.current_device
    found["here"] = uses_cuda()
    in_thread("activated", True)
    in_thread("not activated", False)
    with torch.cuda.stream(torch.cuda.current_stream()):
        torch.cuda.Event(enable_timing=True).record()
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(2)
    torch.cuda.set_rng_state(state)
    found["rng"] = torch.equal(first, torch.rand(2))
    found["backend"] = platform.backend(torch.device("cpu")), platform.backend(torch.device("cuda"))
    del found["patched"]
    return {**found, **results}


def test_activate_twice_and_in_threads():
    found = helpers.run_ranks(drive, 1)[0]
    assert [d.type for d in found["devices"]] == ["cpu", "cpu"]
    assert found["here"] == found["activated"] == ({"cpu"}, "torch.cuda.FloatTensor")
    assert isinstance(found["not activated"], str), "a thread that did not ask is not redirected"
    assert found["rng"] and found["backend"] == ("gloo", "nccl")


def in_second_thread(rank, world, init, folder: str) -> list:
    """An engine used from another thread than the one that built it, as a thread pool would."""
    import threading

    from hybridrl.data.packed import pack
    from hybridrl.megatron import platform
    from hybridrl.megatron.engine import Engine
    from hybridrl.megatron.losses import collect

    coords, device = helpers.join(rank, world, init)
    engine = Engine(helpers.engine_settings(folder, optim={"lr": 1e-3}), coords, device)
    batch, out = pack(helpers.samples([(4, 6)])), []

    def work():
        platform.activate("cpu")
        out.append(engine.run([batch], collect, train=False)[0]["logprobs"])
        engine.run([batch], lambda o, p: (o["logprobs"].sum(), {}), train=True)
        out.append(engine.step()["grad_norm"])

    here = engine.run([batch], collect, train=False)[0]["logprobs"]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return [here, *out]


def test_engine_runs_in_another_thread(models):
    here, there, norm = helpers.run_ranks(in_second_thread, 1, models["tied"])[0]
    assert here.equal(there) and norm > 0


class Config:
    """A transformers config, as far as families read it."""

    def __init__(self, **values):
        self.__dict__.update(values)


def config_of(kind: str, **values):
    import transformers

    return getattr(transformers, f"{kind}Config")(**dict(max_position_embeddings=512) | values)


def test_family_names_the_known_ones():
    from hybridrl.megatron.families import FAMILIES, family_of

    assert family_of(config_of("Qwen2")).qkv_bias and family_of(config_of("Qwen3")).qk_norm
    assert family_of(config_of("Llama")) == family_of(config_of("Mistral", sliding_window=None))
    with pytest.raises(ValueError, match=rf"'gpt_neox' is not supported yet.*{', '.join(sorted(FAMILIES))}"):
        family_of(Config(model_type="gpt_neox"))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("kind, values, words", [
    ("Llama", {"attention_bias": True}, "attention_bias=true.*llama"),
    ("Qwen3", {"attention_bias": True}, "attention_bias=true.*qwen3"),
    ("Llama", {"mlp_bias": True}, "mlp_bias=true"),
    ("Llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("Mistral", {"sliding_window": 256}, "sliding_window=256 .*set max_position_embeddings to 256"),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 4}, "sliding_window=256"),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 4}, "sliding_window=256"),
    ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'.*length"),
    ("Llama", {"rope_parameters": YARN}, "'yarn'.*scales attention by 1.13863"),
    ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor"),
])
def test_variants_that_the_model_does_not_have_are_refused(kind, values, words):
    from hybridrl.megatron.families import family_of

    with pytest.raises(ValueError, match=words):
        family_of(config_of(kind, **values))


@pytest.mark.parametrize("kind, values", [
    ("Mistral", {"sliding_window": 512}),
    ("Mistral", {"sliding_window": None}),
    ("Qwen2", {"use_sliding_window": False, "sliding_window": 256}),
])
def test_windows_that_change_nothing_are_fine(kind, values):
    from hybridrl.megatron.families import family_of

    family_of(config_of(kind, **values))


def test_frequencies_of_both_transformers():
    import torch

    from hybridrl.megatron.families import head_dim, inverse_frequencies

    wanted = 5e5 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    sizes = {"head_dim": 32}
    for found in (Config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **sizes),
                  Config(rope_theta=5e5, **sizes), Config(rope_theta=5e5, rope_scaling=None, **sizes)):
        torch.testing.assert_close(inverse_frequencies(found).double(), wanted, rtol=1e-6, atol=0)
    yarn = config_of("Llama", head_dim=32, rope_parameters=YARN | {"attention_factor": 1.0})
    assert inverse_frequencies(yarn).shape == (16,)  # its attention factor is 1
    assert head_dim(Config(hidden_size=128, num_attention_heads=4)) == 32
    assert head_dim(Config(head_dim=64, hidden_size=128, num_attention_heads=4)) == 64


def test_transformer_engine_is_refused_on_the_cpu():
    import torch

    from hybridrl.megatron.specs import resolve_impl

    assert resolve_impl("auto", torch.device("cpu")) == resolve_impl("local", torch.device("cpu")) == "local"
    with pytest.raises(ValueError, match="transformer_impl=transformer_engine needs a GPU"):
        resolve_impl("transformer_engine", torch.device("cpu"))


def test_unknown_transformer_field_names_the_key():
    import torch

    from hybridrl.config import Megatron
    from hybridrl.megatron.config_from_hf import transformer_config

    hf = config_of("Qwen2", num_hidden_layers=2, hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    settings = dict(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, dtype="float32")
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="override_transformer_config.*no_such_field"):
        transformer_config(hf, Megatron(**settings, override_transformer_config={"no_such_field": 1}), cpu)
    changed = transformer_config(hf, Megatron(**settings, override_transformer_config={"layernorm_epsilon": 0.5}), cpu)
    assert changed.layernorm_epsilon == 0.5
