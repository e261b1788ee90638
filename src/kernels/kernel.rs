//! The kernels by name: what a launch says, and what an image is searched for.

macro_rules! kernels {
    ($($image:literal { $($kernel:ident = $entry:literal, $params:ident;)* })*) => {
        /// Every kernel there is, by the name its C side has.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kernel {
            $($(
                #[doc = concat!(
                    "`", $entry, "`, with [`abi::", stringify!($params), "`](crate::abi::", stringify!($params), ")."
                )]
                $kernel,
            )*)*
        }

        impl Kernel {
            /// All of them; `ALL[kernel as usize] == kernel`.
            pub const ALL: &'static [Self] = &[$($(Self::$kernel,)*)*];

            /// The image that holds it: the name of its source file without `.cu`.
            pub const fn image(self) -> &'static str {
                match self {
                    $($(Self::$kernel => $image,)*)*
                }
            }

            /// The name to look it up by in that image.
            pub const fn entry(self) -> &'static str {
                match self {
                    $($(Self::$kernel => $entry,)*)*
                }
            }

            /// The fields of its parameter struct, for people.
            pub(super) fn describe(self, params: &[u8]) -> String {
                match self {
                    $($(Self::$kernel => described::<crate::abi::$params>(params),)*)*
                }
            }
        }
    };
}

fn described<T: bytemuck::AnyBitPattern + std::fmt::Debug>(params: &[u8]) -> String {
    match bytemuck::try_pod_read_unaligned::<T>(params) {
        Ok(params) => format!("{params:?}"),
        Err(_) => format!("{} bytes that are no parameters of it", params.len()),
    }
}

// By image, each kernel with its entry and its parameters.
kernels! {
    "activation" {
        Add = "fastkv_add", AddParams;
        Convert = "fastkv_convert", ConvertParams;
        SiluMul = "fastkv_silu_mul", SiluMulParams;
    }
    "attention" {
        PagedAttentionF16D64 = "fastkv_paged_attention_f16_64", PrefillAttentionParams;
        PagedAttentionF16D96 = "fastkv_paged_attention_f16_96", PrefillAttentionParams;
        PagedAttentionF16D128 = "fastkv_paged_attention_f16_128", PrefillAttentionParams;
        PagedAttentionF16D256 = "fastkv_paged_attention_f16_256", PrefillAttentionParams;
        PagedAttentionBf16D64 = "fastkv_paged_attention_bf16_64", PrefillAttentionParams;
        PagedAttentionBf16D96 = "fastkv_paged_attention_bf16_96", PrefillAttentionParams;
        PagedAttentionBf16D128 = "fastkv_paged_attention_bf16_128", PrefillAttentionParams;
        PagedAttentionBf16D256 = "fastkv_paged_attention_bf16_256", PrefillAttentionParams;
        PrefillAttentionF16D64 = "fastkv_prefill_attention_f16_64", PrefillAttentionParams;
        PrefillAttentionF16D96 = "fastkv_prefill_attention_f16_96", PrefillAttentionParams;
        PrefillAttentionF16D128 = "fastkv_prefill_attention_f16_128", PrefillAttentionParams;
        PrefillAttentionF16D256 = "fastkv_prefill_attention_f16_256", PrefillAttentionParams;
        PrefillAttentionBf16D64 = "fastkv_prefill_attention_bf16_64", PrefillAttentionParams;
        PrefillAttentionBf16D96 = "fastkv_prefill_attention_bf16_96", PrefillAttentionParams;
        PrefillAttentionBf16D128 = "fastkv_prefill_attention_bf16_128", PrefillAttentionParams;
        PrefillAttentionBf16D256 = "fastkv_prefill_attention_bf16_256", PrefillAttentionParams;
    }
    "columns" {
        ColumnSumsF16D64 = "fastkv_column_sums_f16_64", ColumnSumsParams;
        ColumnSumsF16D96 = "fastkv_column_sums_f16_96", ColumnSumsParams;
        ColumnSumsF16D128 = "fastkv_column_sums_f16_128", ColumnSumsParams;
        ColumnSumsF16D256 = "fastkv_column_sums_f16_256", ColumnSumsParams;
        ColumnSumsBf16D64 = "fastkv_column_sums_bf16_64", ColumnSumsParams;
        ColumnSumsBf16D96 = "fastkv_column_sums_bf16_96", ColumnSumsParams;
        ColumnSumsBf16D128 = "fastkv_column_sums_bf16_128", ColumnSumsParams;
        ColumnSumsBf16D256 = "fastkv_column_sums_bf16_256", ColumnSumsParams;
    }
    "decode" {
        DecodeF16D64Q8 = "fastkv_decode_f16_64_q8", DecodeParams;
        DecodeF16D64Q16 = "fastkv_decode_f16_64_q16", DecodeParams;
        DecodeF16D96Q8 = "fastkv_decode_f16_96_q8", DecodeParams;
        DecodeF16D96Q16 = "fastkv_decode_f16_96_q16", DecodeParams;
        DecodeF16D128Q8 = "fastkv_decode_f16_128_q8", DecodeParams;
        DecodeF16D128Q16 = "fastkv_decode_f16_128_q16", DecodeParams;
        DecodeF16D256Q8 = "fastkv_decode_f16_256_q8", DecodeParams;
        DecodeF16D256Q16 = "fastkv_decode_f16_256_q16", DecodeParams;
        DecodeBf16D64Q8 = "fastkv_decode_bf16_64_q8", DecodeParams;
        DecodeBf16D64Q16 = "fastkv_decode_bf16_64_q16", DecodeParams;
        DecodeBf16D96Q8 = "fastkv_decode_bf16_96_q8", DecodeParams;
        DecodeBf16D96Q16 = "fastkv_decode_bf16_96_q16", DecodeParams;
        DecodeBf16D128Q8 = "fastkv_decode_bf16_128_q8", DecodeParams;
        DecodeBf16D128Q16 = "fastkv_decode_bf16_128_q16", DecodeParams;
        DecodeBf16D256Q8 = "fastkv_decode_bf16_256_q8", DecodeParams;
        DecodeBf16D256Q16 = "fastkv_decode_bf16_256_q16", DecodeParams;
    }
    "embed" {
        Embed = "fastkv_embed", EmbedParams;
    }
    "gather" {
        Compact = "fastkv_compact", CompactParams;
        GatherIndices = "fastkv_gather_indices", GatherIndicesParams;
        GatherKv = "fastkv_gather_kv", GatherKvParams;
        GatherRows = "fastkv_gather_rows", GatherRowsParams;
    }
    "norm" {
        RmsNorm = "fastkv_rms_norm", RmsNormParams;
    }
    "rope" {
        Rope = "fastkv_rope", RopeParams;
    }
    "sample" {
        Sample = "fastkv_sample", SampleParams;
    }
    "scores" {
        PoolScores = "fastkv_pool_scores", PoolScoresParams;
        WindowLse = "fastkv_window_lse", WindowScoresParams;
        WindowPartialsF16D64 = "fastkv_window_partials_f16_64", WindowScoresParams;
        WindowPartialsF16D96 = "fastkv_window_partials_f16_96", WindowScoresParams;
        WindowPartialsF16D128 = "fastkv_window_partials_f16_128", WindowScoresParams;
        WindowPartialsF16D256 = "fastkv_window_partials_f16_256", WindowScoresParams;
        WindowPartialsBf16D64 = "fastkv_window_partials_bf16_64", WindowScoresParams;
        WindowPartialsBf16D96 = "fastkv_window_partials_bf16_96", WindowScoresParams;
        WindowPartialsBf16D128 = "fastkv_window_partials_bf16_128", WindowScoresParams;
        WindowPartialsBf16D256 = "fastkv_window_partials_bf16_256", WindowScoresParams;
        WindowScoresF16D64 = "fastkv_window_scores_f16_64", WindowScoresParams;
        WindowScoresF16D96 = "fastkv_window_scores_f16_96", WindowScoresParams;
        WindowScoresF16D128 = "fastkv_window_scores_f16_128", WindowScoresParams;
        WindowScoresF16D256 = "fastkv_window_scores_f16_256", WindowScoresParams;
        WindowScoresBf16D64 = "fastkv_window_scores_bf16_64", WindowScoresParams;
        WindowScoresBf16D96 = "fastkv_window_scores_bf16_96", WindowScoresParams;
        WindowScoresBf16D128 = "fastkv_window_scores_bf16_128", WindowScoresParams;
        WindowScoresBf16D256 = "fastkv_window_scores_bf16_256", WindowScoresParams;
    }
    "select" {
        SelectBlock = "fastkv_select_block", SelectParams;
        SelectDigit = "fastkv_select_digit", SelectParams;
        SelectRank = "fastkv_select_rank", SelectParams;
        SelectSplit = "fastkv_select_split", SelectParams;
        SelectWrite = "fastkv_select_write", SelectParams;
    }
    "share" {
        ShareKeys = "fastkv_share_keys", ShareKeysParams;
    }
    "sm90_attention" {
        Sm90AttentionF16D64 = "fastkv_sm90_attention_f16_64", Sm90AttentionParams;
        Sm90AttentionF16D128 = "fastkv_sm90_attention_f16_128", Sm90AttentionParams;
        Sm90AttentionBf16D64 = "fastkv_sm90_attention_bf16_64", Sm90AttentionParams;
        Sm90AttentionBf16D128 = "fastkv_sm90_attention_bf16_128", Sm90AttentionParams;
    }
    "sm90_select" {
        SelectCluster = "fastkv_select_cluster", SelectParams;
    }
    "sums" {
        AddScores = "fastkv_add_scores", AddScoresParams;
        GatherScores = "fastkv_gather_scores", GatherScoresParams;
        MarkKeys = "fastkv_mark_keys", MarkKeysParams;
        RaiseScores = "fastkv_raise_scores", RaiseScoresParams;
    }
}
