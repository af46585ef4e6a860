"""What a model is, without its weights: parameters of a config, counted and not allocated."""

from puna.models import decoder
from puna.models.config import read_hub

config = read_hub(
    {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }
).config
for name, shape in list(decoder.shapes(config).items())[:6]:
    print(f"{name:28} {shape}")
print(f"{decoder.parameter_count(config):,} parameters")
