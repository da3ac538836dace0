"""Faults of a checkpoint, met where a user meets them: `edge-export`. The numbers are those of the list of faults."""

import json
import math
import os
import shutil
import struct

import pytest

from tests.faulty import (
    CONFIG,
    GENERATION,
    INDEX,
    TEMPLATE,
    TOKENIZER,
    WEIGHTS,
    Fault,
    Pair,
    all_of,
    config,
    entry,
    fifo_instead_of,
    folder_instead_of,
    generation,
    header,
    index,
    last_weight,
    only_pickles,
    raw,
    remove,
    tensors,
    tokenizer,
    twice,
    vocabulary,
    without,
    write,
)

Q = "model.layers.0.self_attn.q_proj.weight"  # [64, 40]
K_NORM = "model.layers.0.self_attn.k_norm.weight"  # [16]
K = "model.layers.0.self_attn.k_proj.weight"  # as large
NORM = "model.norm.weight"
LENGTH = struct.Struct("<Q")
CONFIG_FAULTS: dict[str, Fault] = {  # 42
    "layer_types-number": (config(layer_types=5), "layer_types is 5, expected a list of 5 names"),
    "layer_types-nested": (config(layer_types=[[1]] * 5), r"layer_types has \[1\], expected one of sliding_attention,"),
    "layer_types-unknown": (config(layer_types=["x"] * 5), "layer_types has 'x', expected one of"),
    "layer_types-short": (
        config(layer_types=["full_attention"] * 4),
        "layer_types has 4 entries, num_hidden_layers is",
    ),
    "layer_types-empty": (config(layer_types=[]), "layer_types has 0 entries, num_hidden_layers is 5"),
    "layers-0": (config(num_hidden_layers=0), "num_hidden_layers is 0, expected an integer >= 1"),
    "layers-2^31": (
        all_of(without("layer_types"), config(num_hidden_layers=2**31 - 1)),
        "num_hidden_layers is 2147483647, expected an integer >= 1 and < 1,024",
    ),
    "shared-all": (config(num_kv_shared_layers=5), "num_kv_shared_layers 5 leaves none of 5 with KV"),
    "shared-more": (config(num_kv_shared_layers=6), "num_kv_shared_layers 6 leaves none of 5 with KV"),
    "shared-negative": (config(num_kv_shared_layers=-1), "num_kv_shared_layers is -1, expected an integer >= 0"),
    "shared-string": (config(num_kv_shared_layers="1"), "num_kv_shared_layers is '1', expected an integer >= 0"),
    "shared-without-owner": (
        config(
            layer_types=["full_attention"] * 3 + ["sliding_attention", "full_attention"],
            num_kv_shared_layers=2,
            per_layer_config={},
        ),
        "layer 3 shares sliding KV, but no earlier layer owns any",
    ),
    "head_dim-0": (config(head_dim=0), "head_dim is 0, expected an integer >= 1"),
    "head_dim-odd": (
        config(head_dim=15),
        "layer 0 has head_dim 15 and 4 heads over 4 KV heads; the first must be even",
    ),
    "head_dim-2^40": (
        config(head_dim=2**40),
        "head_dim is 1099511627776, expected an integer >= 1 and < 2,147,483,648",
    ),
    "heads-3": (config(num_attention_heads=3), "3 heads over 4 KV heads; .* a multiple of the KV heads"),
    "kv-heads-0": (config(num_key_value_heads=0), "num_key_value_heads is 0, expected an integer >= 1"),
    "hidden-string": (config(hidden_size="40"), "hidden_size is '40', expected an integer"),
    "hidden-null": (config(hidden_size=None), "hidden_size is None, expected an integer"),
    "hidden-long": (config(hidden_size="\n" * 10**6), r"hidden_size is '.*\.\.\..*', expected an integer"),
    "vocab-other": (config(vocab_size=500), "vocab_size_per_layer_input is 512, vocab_size 500"),
    "vocab-larger": (
        config(vocab_size=600, vocab_size_per_layer_input=600),
        r"embed_tokens.weight has shape \[512, 40\], expected \[600, 40\] from config.json|drafter's vocabulary is 512",
    ),
    "window-0": (config(sliding_window=0), "sliding_window is 0, expected an integer >= 1"),
    "eps-0": (config(rms_norm_eps=0), "rms_norm_eps is 0, expected a number above 0"),
    "eps-1e-300": (
        config(rms_norm_eps=1e-300),
        "rms_norm_eps is 1e-300, expected a number above 0 that float32 holds",
    ),
    "eps-nan": (config(rms_norm_eps=math.nan), "rms_norm_eps is nan, expected a number above 0"),
    "eps-10^400": (config(rms_norm_eps=10**400), r"rms_norm_eps is 10+\.\.\.0+, expected a number above 0"),
    "rope-number": (config(rope_parameters=5), "rope_parameters is 5, expected an object"),
    "rope-half": (
        config(rope_parameters={"full_attention": {}}),
        "rope_parameters: sliding_attention is None, expected",
    ),
    "rope-theta": (
        config(rope_parameters={"full_attention": {"rope_theta": 0.5}, "sliding_attention": {}}),
        "rope_parameters: full_attention: rope_theta is 0.5, expected a number of at least 1",
    ),
    "rope-type": (
        config(rope_parameters={"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}}),
        "rope_type is 'yarn' with factor 1.0, expected default or proportional",
    ),
    "softcap-0": (config(final_logit_softcapping=0), "final_logit_softcapping is 0, expected a number above 0"),
    "softcap-text": (config(final_logit_softcapping="x"), "final_logit_softcapping is 'x', expected a number above 0"),
    "eos-null": (config(eos_token_id=None), "eos_token_id is None, expected a token id below 512 or a list of them"),
    "eos-strings": (config(eos_token_id=["1"]), r"eos_token_id is \['1'\], expected a token id below 512"),
    "eos-none": (config(eos_token_id=[]), r"eos_token_id is \[\], expected a token id below 512"),
    "eos-negative": (config(eos_token_id=-1), "eos_token_id is -1, expected a token id below 512"),
    "eos-large": (config(eos_token_id=[1, 512]), r"eos_token_id is \[1, 512\], expected a token id below 512"),
    "bos-large": (config(bos_token_id=512), "bos_token_id is 512, expected an integer >= 0 and < 512"),
    "context-0": (config(max_position_embeddings=0), "max_position_embeddings is 0, expected an integer >= 1"),
    "mlp-other": (config(intermediate_size=97), r"mlp.gate_proj.weight has shape \[96, 40\], expected \[97, 40\] from"),
    "mlp-wide-text": (config(use_double_wide_mlp="no"), "use_double_wide_mlp is 'no', expected true or false"),
    "per-layer-list": (config(per_layer_config=[]), r"per_layer_config is \[\], expected an object"),
    "per-layer-nested": (config(per_layer_config={"4": [1]}), r"per_layer_config: 4 is \[1\], expected an object"),
    "per-layer-none": (config(per_layer_config={"9" * 5000: {}}), "no such layer, there are 5"),
    "model-type": (config(model_type="llama"), "model_type is 'llama', expected gemma4 or gemma4_text"),
    "model-type-list": (config(model_type=["gemma4"]), r"model_type is \['gemma4'\], expected gemma4 or gemma4_text"),
    "text-config": (config(text_config=5), "text_config is not an object"),
    "ple-0": (config(hidden_size_per_layer_input=0), "hidden_size_per_layer_input is 0: not a Gemma 4 E-series model"),
    "ple-other": (
        config(hidden_size_per_layer_input=17),
        r"has shape \[512, 80\], expected \[512, 85\] from config.js",
    ),
    "experts": (config(enable_moe_block=True), "enable_moe_block is True, expected False as in Gemma 4 E-series"),
    "activation": (config(hidden_activation="x" * 10**6), r"hidden_activation is '.*\.\.\..*', expected 'gelu_pytorch"),
    "empty": (write(CONFIG, ""), "config.json: not readable as JSON: Expecting value"),
    "cut": (write(CONFIG, '{"a"'), "config.json: not readable as JSON"),
    "list": (write(CONFIG, "[]"), "config.json: holds a list, expected an object"),
    "deep": (write(CONFIG, '{"a":' * 100_000), "config.json: not readable as JSON: maximum recursion depth exceeded"),
    "not-utf8": (write(CONFIG, b"\xff{}"), "config.json: not UTF-8 at byte 0"),
    "zeros": (write(CONFIG, bytes(100)), "config.json: not readable as JSON"),
    "long-number": (
        write(CONFIG, f'{{"hidden_size": {"9" * 5000}}}'),
        "config.json: not readable as JSON: Exceeds the",
    ),
    "folder": (folder_instead_of(CONFIG), "config.json: not a regular file"),
    "fifo": (fifo_instead_of(CONFIG), "config.json: not a regular file"),
    "missing": (remove(CONFIG), "config.json: missing; SOURCE must be a Hugging Face"),
}
GENERATION_FAULTS: dict[str, Fault] = {
    "temperature-hot": (generation(temperature="hot"), "temperature must be a finite number >= 0 .*, got 'hot'"),
    "temperature-negative": (generation(temperature=-1), "temperature must be a finite number >= 0 .*, got -1"),
    "temperature-nan": (generation(temperature=math.nan), "temperature must be a finite number >= 0 .*, got nan"),
    "temperature-inf": (write(GENERATION, '{"temperature": 1e400}'), "temperature must be a finite number .*, got inf"),
    "temperature-10^400": (generation(temperature=10**400), r"temperature must be a finite number .*, got 10+\.\.\.0+"),
    "temperature-true": (generation(temperature=True), "temperature must be a finite number >= 0 .*, got True"),
    "top_k-negative": (generation(top_k=-1), "top_k must be a whole number >= 0 .*, got -1"),
    "top_k-half": (generation(top_k=1.5), "top_k must be a whole number >= 0 .*, got 1.5"),
    "top_k-list": (generation(top_k=[]), r"top_k must be a whole number >= 0 .*, got \[\]"),
    "top_p-0": (generation(top_p=0), "top_p must be a number above 0 and at most 1 .*, got 0"),
    "top_p-2": (generation(top_p=2), "top_p must be a number above 0 and at most 1 .*, got 2"),
    "do_sample-no": (generation(do_sample="no"), "do_sample is 'no', expected true or false"),
    "eos-string": (generation(eos_token_id="1"), "eos_token_id is '1', expected a token id below 512 or a list"),
    "eos-strings": (generation(eos_token_id=["1"]), r"eos_token_id is \['1'\], expected a token id below 512"),
    "eos-nested": (generation(eos_token_id=[[1]]), r"eos_token_id is \[\[1\]\], expected a token id below 512"),
    "eos-true": (generation(eos_token_id=True), "eos_token_id is True, expected a token id below 512"),
    "eos-half": (generation(eos_token_id=1.5), "eos_token_id is 1.5, expected a token id below 512"),
    "eos-none": (generation(eos_token_id=[]), r"eos_token_id is \[\], expected a token id below 512"),
    "eos-large": (generation(eos_token_id=10**9), "eos_token_id is 1000000000, expected a token id below 512"),
    "eos-object": (generation(eos_token_id={"a": 1}), "eos_token_id is {'a': 1}, expected a token id below 512"),
    "list": (write(GENERATION, "[]"), "generation_config.json: holds a list, expected an object"),
    "cut": (write(GENERATION, "{"), "generation_config.json: not readable as JSON"),
    "folder": (folder_instead_of(GENERATION), "generation_config.json: not a regular file"),
}
WEIGHT_FAULTS: dict[str, Fault] = {
    # 1-4 of a source
    "cut-to-0": (raw(lambda content: b""), "model.safetensors: not a readable safetensors file"),
    "cut-to-7": (raw(lambda content: content[:7]), "model.safetensors: not a readable safetensors file"),
    "cut-in-header": (raw(lambda content: content[:500]), "model.safetensors: not a readable safetensors file"),
    "cut-in-half": (raw(lambda content: content[: len(content) // 2]), "model.safetensors: not a readable safetensors"),
    "cut-by-1": (raw(lambda content: content[:-1]), "model.safetensors: not a readable safetensors file"),
    "trailing": (raw(lambda content: content + b"0"), "model.safetensors: not a readable safetensors file"),  # 8
    "zeroed": (raw(lambda content: content[:8] + bytes(900) + content[908:]), "model.safetensors: not a readable"),  # 7
    # 11
    "length-0": (raw(lambda content: LENGTH.pack(0) + content[8:]), "model.safetensors: not a readable safetensors"),
    "length-200MB": (raw(lambda content: LENGTH.pack(200 << 20) + content[8:]), "model.safetensors: not a readable"),
    "length-2^63": (raw(lambda content: LENGTH.pack(2**63) + content[8:]), "model.safetensors: not a readable"),
    "length-2^64-1": (raw(lambda content: LENGTH.pack(2**64 - 1) + content[8:]), "model.safetensors: not a readable"),
    # 12-15
    "key-twice": (twice(Q, K), "not a readable safetensors file: .*invalid offset"),
    "overlap": (header(lambda entries: entries | {Q: entries[K]}), "not a readable safetensors file: .*invalid offset"),
    "gap": (
        header(lambda entries: {name: entries[name] for name in entries if name != Q}),
        "invalid offset for tensor",
    ),
    "shape-overflow": (entry(Q, shape=[2**40, 2**40]), "not a readable safetensors file: .*overflow"),
    "shape-0": (entry(Q, shape=[0, 40]), "not a readable safetensors file: .*invalid shape, data type, or offset"),
    "shape-negative": (entry(Q, shape=[-1, 40]), "not a readable safetensors file: .*expected usize"),
    "dtype-smaller": (entry(Q, dtype="BF16"), "not a readable safetensors file: .*invalid shape, data type, or offset"),
    "dtype-unknown": (entry(Q, dtype="X1"), "not a readable safetensors file: .*unknown variant `X1`"),
    "shape-turned": (
        entry(Q, shape=[40, 64]),
        r"tensor .*q_proj.weight has shape \[40, 64\], expected \[64, 40\] from",
    ),
    "shape-flat": (
        entry(Q, shape=[2560]),
        r"tensor .*q_proj.weight has shape \[2560\], expected \[64, 40\] from config",
    ),
    "norm-matrix": (
        entry(NORM, shape=[4, 10]),
        r"tensor model.norm.weight has shape \[4, 10\], expected \[40\] from con",
    ),
    "dtype-integer": (entry(Q, dtype="I32"), "is stored as I32, expected one of BF16, F16, F32, F64, as config.json n"),
    # 39, 40
    "pickle": (only_pickles, r"only pickled weights \(pytorch_model.bin\), which can run code .* convert them to safe"),
    "none": (remove(WEIGHTS), r"no \*.safetensors files"),
    "folder": (folder_instead_of(WEIGHTS), r"no \*.safetensors files"),
    "fifo": (fifo_instead_of(WEIGHTS), r"no \*.safetensors files"),
    "no-tensor": (tensors(lambda loaded: loaded.pop(Q)), f"tensor {Q} is missing from the safetensors files"),
    "no-table": (tensors(lambda loaded: loaded.pop("model.embed_tokens.weight")), "no tensor embed_tokens.weight; not"),
    # 40
    "index-absent-tensor": (
        index(lambda names: {"weight_map": names | {"model.ghost": WEIGHTS}}),
        "model.safetensors.index.json: names model.ghost, but no shard has it",
    ),
    "index-absent-shard": (
        index(lambda names: {"weight_map": names | {Q: "model-2.safetensors"}}),
        "model-2.safetensors: the shard is missing; download the checkpoint again",
    ),
    "index-path": (
        index(lambda names: {"weight_map": names | {Q: f"../assistant/{WEIGHTS}"}}),
        "shard model.safetensors is not in the index's own folder",
    ),
    "index-list": (write(INDEX, "[]"), "model.safetensors.index.json: holds a list, expected an object"),
    "index-empty": (
        write(INDEX, "{}"),
        "model.safetensors.index.json: weight_map is no object of tensor and file names",
    ),
    "index-map-list": (index(lambda names: {"weight_map": list(names)}), "weight_map is no object of tensor and file"),
    "index-map-null": (index(lambda names: {"weight_map": None}), "weight_map is no object of tensor and file names"),
    "index-shard-list": (index(lambda names: {"weight_map": names | {Q: ["a"]}}), "weight_map is no object of tensor"),
    "index-cut": (write(INDEX, '{"weight_map"'), "model.safetensors.index.json: not readable as JSON"),
    # 41
    "nan": (
        last_weight(Q, math.nan),
        f"model.safetensors: tensor {Q} holds NaN or infinity; the checkpoint is damaged",
    ),
    "inf": (
        last_weight("model.embed_tokens.weight", math.inf),
        "tensor model.embed_tokens.weight holds NaN or infinity",
    ),
    "minus-inf": (last_weight("model.embed_tokens_per_layer.weight", -math.inf), "embed_tokens_per_layer.weight holds"),
    "norm-nan": (last_weight(NORM, math.nan), "tensor model.norm.weight holds NaN or infinity"),
    "scalar-nan": (last_weight("model.layers.3.layer_scalar", math.nan), "model.layers.3.layer_scalar holds NaN"),
    "scalar-0": (last_weight("model.layers.3.layer_scalar", 0), "layers.3.layer_scalar is 0, which erases the layer's"),
    "scale-too-large": (
        last_weight("model.embed_tokens_per_layer.weight", 1e30),
        "ple_table: weights exceed a scale of float16; export with --bits 32",
    ),
}


TEXT_FAULTS: dict[str, Fault] = {
    "missing": (
        remove(TOKENIZER),
        "tokenizer.json: missing; save the tokenizer beside the w",
    ),
    "folder": (folder_instead_of(TOKENIZER), "tokenizer.json: missing"),
    "empty": (write(TOKENIZER, ""), "not a tokenizer: EOF while parsing .*; download the checkpoint again"),
    "object": (write(TOKENIZER, "{}"), "not a tokenizer: Model missing"),
    "cut": (lambda folder: os.truncate(folder / TOKENIZER, 3000), "not a tokenizer: EOF while parsing"),
    "deep": (write(TOKENIZER, "[" * 100_000), "not a tokenizer: invalid type: sequence"),
    "not-utf8": (write(TOKENIZER, b"\xff" * 9), "not a tokenizer: stream did not contain valid UTF-8"),
    "no-model": (tokenizer(model=None), "not a tokenizer: data did not match"),
    "no-decoder": (tokenizer(decoder=None), "tokenizer.json: decoder none cannot be streamed, expected only"),
    "id-too-large": (
        vocabulary(lambda ids: ids | {"zzz": 512}),
        "tokenizer.json: token 'zzz' has id 512, expected ids below 512",
    ),
    "no-bos": (
        all_of(
            tokenizer(added_tokens=[]),
            vocabulary(lambda ids: {token: id_ for token, id_ in ids.items() if id_ != 2}),
        ),
        "tokenizer.json: no token has id 2, which is the model's BOS",
    ),
    "template-not-utf8": (write(TEMPLATE, b"\xff"), "chat_template.jinja: not UTF-8 at byte 0"),
    "template-syntax": (write(TEMPLATE, "{% if %}"), "chat template, line 1: .*; mend the template or remove it"),
    "template-folder": (folder_instead_of(TEMPLATE), "chat_template.jinja: not a regular file"),
    "template-inside": (
        all_of(remove(TEMPLATE), write("tokenizer_config.json", '{"chat_template": "{{"}')),
        "chat template, line 1: ",
    ),
    "tokenizer-config-cut": (
        all_of(remove(TEMPLATE), write("tokenizer_config.json", "{")),
        "tokenizer_config.json: not readable as JSON",
    ),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_config_that_is_none(pair: Pair, fault: str) -> None:  # 42
    change, match = CONFIG_FAULTS[fault]
    change(pair.target)
    pair.refused(match)


@pytest.mark.parametrize("fault", GENERATION_FAULTS)
def test_sampling_defaults_that_are_none(pair: Pair, fault: str) -> None:  # 42
    change, match = GENERATION_FAULTS[fault]
    change(pair.target)
    pair.refused(match)


def test_null_is_no_sampling_default(pair: Pair) -> None:
    generation(temperature=None, top_k=None, top_p=None, do_sample=None, eos_token_id=None)(pair.target)
    assert pair.export() == 0
    manifest = json.loads((pair.out / "manifest.json").read_text())
    assert manifest["generation"] == {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "eos_token_ids": [1]}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_weights_that_are_damaged(pair: Pair, fault: str) -> None:  # 1-4, 7, 8, 11-15, 39-41
    change, match = WEIGHT_FAULTS[fault]
    change(pair.target)
    pair.refused(match)


def test_weights_beyond_float16(pair: Pair) -> None:  # 41
    last_weight(Q, 1e5)(pair.target)
    pair.refused("layers.0.self_attn.qkv_proj: weights exceed float16; export with --bits 32", "--bits", 16)


def test_keys_beyond_float16(pair: Pair) -> None:
    last_weight(K_NORM, -1.7e4)(pair.target)  # times sqrt(16)
    match = "k_norm.weight: keys of up to 68,000 exceed float16; export with --activations float32"
    pair.refused(match)
    pair.refused(match, "--layout", "portable")  # which holds the native graphs, too
    assert pair.export("--activations", "float32") == 0
    shutil.rmtree(pair.out)
    last_weight(K_NORM, 1.6e4)(pair.target)
    assert pair.export() == 0


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_text_files_that_are_damaged(pair: Pair, fault: str) -> None:
    change, match = TEXT_FAULTS[fault]
    change(pair.target)
    pair.refused(match)


def test_a_key_twice_with_one_meaning_is_no_fault(pair: Pair) -> None:  # 12
    assert pair.export() == 0
    before = (pair.out / "decoder.onnx.data").read_bytes()
    shutil.rmtree(pair.out)
    twice(Q, Q)(pair.target)
    assert pair.export() == 0
    assert (pair.out / "decoder.onnx.data").read_bytes() == before
