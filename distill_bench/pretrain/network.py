"""mini-wan's network: a small Wan transformer with its text encoder and tokenizer."""

from diffusers import WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from distill_bench.domain import shapes

TEXT_LENGTH = 10  # tokens per caption


class TeacherNetwork(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=vocabulary,
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=1,
                num_heads=4,
                dropout_rate=0.0,
            )
        )
        self.transformer = WanTransformer3DModel(
            # A token sees one latent cell in all frames. A network of this size with (2, 2, 2)
            # needed ten times as many updates for the same accuracy of speeds.
            patch_size=(8, 1, 1),
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=64,
            freq_dim=64,
            ffn_dim=512,
            num_layers=6,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        )

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (B, L, 64) with zeros for padding, as in WanPipeline."""
        return self.text_encoder(ids, mask).last_hidden_state * mask.unsqueeze(-1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per word of the domain's captions."""
    words = sorted({word for a in shapes.all_attributes() for word in shapes.caption(a).split()})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def tokens(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask of captions, (N, TEXT_LENGTH) each."""
    encoded = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask
