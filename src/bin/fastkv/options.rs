//! Options of policies, shared by the subcommands.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use fastkv::model::{ModelDir, Tokenizer};
use fastkv::policy::{
    self, AdaKv, Budget, FastGen, FastKv, GemFilter, H2o, HeadKv, HeadScores, Policy, PoolingKind,
    PyramidInfer, PyramidKv, Random, Saliency, SnapKv, StreamingLlm, TokenClasses, Tsp,
};

use crate::exit::Usage;
use crate::tsp_layer::TspLayer;

/// The policies by name; `fastkv-constant` is the preset of the first paper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PolicyName {
    /// Keep everything.
    Full,
    /// FastKV with budgets in proportion to the prompt: retention 0.1, propagation 0.2.
    Fastkv,
    /// FastKV with constant budgets: retention 512, propagation 2048.
    FastkvConstant,
    /// SnapKV: every layer reads the whole prompt, the cache is chosen per GQA group.
    Snapkv,
    /// PyramidKV: SnapKV whose budget falls from the first layer to the last.
    Pyramidkv,
    /// AdaKV: SnapKV whose heads share the budget of a layer.
    Adakv,
    /// HeadKV: SnapKV with budgets from measured scores of the heads.
    Headkv,
    /// H2O: the tokens that all queries attend to most; evicts in decoding too.
    H2o,
    /// FastGen: each head gets the cheapest set of tokens that recovers its attention.
    Fastgen,
    /// GemFilter: early layers pick tokens, and the model starts anew with these.
    Gemfilter,
    /// PyramidInfer: every layer hands on fewer tokens than it read.
    Pyramidinfer,
    /// StreamingLLM: the first tokens and the last ones.
    Streamingllm,
    /// A uniform choice beside the window: the control.
    Random,
    /// FastKV's token-selective propagation, and SnapKV's caches; so below.
    #[value(name = "fastkv+snapkv")]
    FastkvSnapkv,
    /// With PyramidKV's caches.
    #[value(name = "fastkv+pyramidkv")]
    FastkvPyramidkv,
    /// With AdaKV's caches.
    #[value(name = "fastkv+adakv")]
    FastkvAdakv,
    /// With HeadKV's caches.
    #[value(name = "fastkv+headkv")]
    FastkvHeadkv,
    /// With H2O's caches.
    #[value(name = "fastkv+h2o")]
    FastkvH2o,
    /// With FastGen's caches.
    #[value(name = "fastkv+fastgen")]
    FastkvFastgen,
    /// With StreamingLLM's caches.
    #[value(name = "fastkv+streamingllm")]
    FastkvStreamingllm,
    /// With the control's caches.
    #[value(name = "fastkv+random")]
    FastkvRandom,
}

impl PolicyName {
    /// Every policy that is not composed of two.
    pub(crate) fn singles() -> Vec<Self> {
        Self::value_variants().iter().copied().filter(|name| name.cache().is_none()).collect()
    }

    /// The policy of the caches of a composed one.
    fn cache(self) -> Option<Self> {
        Some(match self {
            Self::FastkvSnapkv => Self::Snapkv,
            Self::FastkvPyramidkv => Self::Pyramidkv,
            Self::FastkvAdakv => Self::Adakv,
            Self::FastkvHeadkv => Self::Headkv,
            Self::FastkvH2o => Self::H2o,
            Self::FastkvFastgen => Self::Fastgen,
            Self::FastkvStreamingllm => Self::Streamingllm,
            Self::FastkvRandom => Self::Random,
            _ => return None,
        })
    }

    /// As the command line spells it.
    pub(crate) fn text(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// What a policy can be told. One that it does not have is an error.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Policy options")]
pub(crate) struct PolicyOptions {
    /// Tokens each layer keeps of the prompt for a kv head: a rate in (0, 1] with a point (0.1), or a
    /// number of tokens (512)
    #[arg(long, value_name = "RATE|TOKENS", value_parser = budget, allow_hyphen_values = true)]
    retention: Option<Budget>,
    /// fastkv: tokens that go on past the TSP layer, a rate or a number of tokens
    #[arg(long, value_name = "RATE|TOKENS", value_parser = budget, allow_hyphen_values = true)]
    propagation: Option<Budget>,
    /// fastkv, snapkv and its kin: queries at the end of the prompt that score the rest; h2o, random:
    /// tokens kept there
    #[arg(long, value_name = "TOKENS")]
    window: Option<usize>,
    /// fastkv, snapkv and its kin, gemfilter: how scores are pooled along the prompt
    #[arg(long, value_enum)]
    pooling: Option<Pooling>,
    /// fastkv, snapkv and its kin, gemfilter: width of the pooling kernel, odd
    #[arg(long, value_name = "WIDTH")]
    kernel: Option<usize>,
    /// fastkv: the last layer that reads the whole prompt, 0-based [default: half depth]; with auto, or first
    /// and last of the candidates (8-24), it is picked during prefill, where the tokens chosen settle
    #[arg(long, value_name = "LAYER|auto|FIRST-LAST", value_parser = TspLayer::parse, allow_hyphen_values = true)]
    tsp_layer: Option<TspLayer>,
    /// fastkv: share of the tokens chosen that a candidate for the TSP layer has in common with the one before
    /// it, for tokens to go on from there
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    tsp_overlap: Option<f64>,
    /// pyramidkv: the last layer keeps the average over this
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    steepness: Option<f64>,
    /// adakv: share of the average that every head gets whatever its scores
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    floor: Option<f64>,
    /// headkv: JSON file of head scores, {"layer-head": [scores]}
    #[arg(long, value_name = "FILE", value_parser = head_scores)]
    heads: Option<HeadScores>,
    /// headkv: 1 over the share of the budget that goes by head scores
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pooled: Option<f64>,
    /// fastgen: share of a head's attention that its set of tokens has to recover
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    recovery: Option<f64>,
    /// fastgen: share of the tokens, the newest, that are local
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    local: Option<f64>,
    /// fastgen: share of the tokens, the most attended, that are frequent
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    frequent: Option<f64>,
    /// gemfilter: the layer that ranks the tokens, 0-based [default: at 13/32 of the depth]
    #[arg(long, value_name = "LAYER")]
    filter_layer: Option<usize>,
    /// pyramidinfer: share of the prompt, its newest tokens, that goes on in every layer
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    recent: Option<f64>,
    /// pyramidinfer: what the share of older tokens that go on falls to in the deepest layers
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    decay: Option<f64>,
    /// streamingllm: tokens kept at the start
    #[arg(long, value_name = "TOKENS")]
    sinks: Option<usize>,
    /// random: seed of the choice
    #[arg(long)]
    seed: Option<u64>,
    /// Run every layer as published: do not skip work that cannot change the answer
    #[arg(long)]
    no_shortcuts: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Pooling {
    Max,
    Average,
}

impl PolicyOptions {
    /// Whether rows that cannot change the logits may be left out, whatever the policy.
    pub(crate) fn exact_shortcuts(&self) -> bool {
        !self.no_shortcuts
    }

    /// The same with another retention.
    pub(crate) fn with_retention(&self, retention: Budget) -> Self {
        Self { retention: Some(retention), ..self.clone() }
    }

    /// Several policies; each takes the options it has, and one that none of them has is an error.
    pub(crate) fn policies(&self, names: &[PolicyName]) -> Result<Vec<Policy>> {
        if self.tsp_overlap.is_some() && !matches!(self.tsp_layer, Some(TspLayer::Auto(_))) {
            bail!(Usage(
                "--tsp-overlap goes with --tsp-layer auto, or with candidates such as 8-24".to_owned()
            ));
        }
        let applied = names.iter().map(|name| self.apply(*name));
        let (policies, unused): (Vec<Policy>, Vec<Self>) = applied.unzip();
        let nobodys = |option: &&'static str| unused.iter().all(|unused| unused.given().contains(option));
        match self.given().into_iter().find(nobodys) {
            None => Ok(policies),
            Some(option) => {
                let has = |name: &PolicyName| format!("{} has {}", name.text(), Self::options_of(*name));
                let has: Vec<String> = names.iter().map(has).collect();
                Err(Usage(format!("--{option} is not an option here: {}", has.join("; "))).into())
            }
        }
    }

    /// Tells the policies what only the model knows: its special tokens and punctuation, and the scores
    /// of its heads where none are given.
    pub(crate) fn complete(&self, policies: &mut [Policy], model: &ModelDir) -> Result<()> {
        for policy in policies {
            if let Some(classes) = policy.token_classes_mut() {
                *classes = token_classes(&model.tokenizer()?, model.config.vocab_size)?;
            }
            if let Some(scores) = policy.head_scores_mut().filter(|scores| scores.is_empty()) {
                let file = model.path.join(HEAD_SCORES);
                if !file.exists() {
                    let message = "headkv needs scores of the heads: give a file with --heads, which \
                                   `fastkv profile heads` measures";
                    bail!(Usage(message.to_owned()));
                }
                *scores = head_scores(&file.to_string_lossy()).map_err(Usage)?;
            }
        }
        Ok(())
    }

    /// The policy, and the options it has no use for.
    fn apply(&self, name: PolicyName) -> (Policy, Self) {
        if let Some(cache) = name.cache() {
            // Both parts take what both have.
            let (cache, mut left) = self.apply(cache);
            let mut tsp = Tsp::with(cache);
            self.clone().take_saliency(&mut tsp.saliency);
            left.take_saliency(&mut FastKv::default().saliency);
            take(&mut left.propagation, &mut tsp.propagation);
            TspLayer::take(&mut left.tsp_layer, &mut left.tsp_overlap, &mut tsp.tsp_layer, &mut tsp.settling);
            return (Policy::Tsp(tsp), left);
        }
        let mut left = self.clone();
        let policy = match name {
            PolicyName::Fastkv => Policy::FastKv(left.take_fastkv(FastKv::proportional())),
            PolicyName::FastkvConstant => Policy::FastKv(left.take_fastkv(FastKv::constant())),
            PolicyName::Snapkv => {
                let mut options = SnapKv::default();
                left.take_saliency(&mut options.saliency);
                take(&mut left.retention, &mut options.retention);
                Policy::SnapKv(options)
            }
            PolicyName::Pyramidkv => {
                let mut options = PyramidKv::default();
                left.take_saliency(&mut options.saliency);
                take(&mut left.retention, &mut options.retention);
                take(&mut left.steepness, &mut options.steepness);
                Policy::PyramidKv(options)
            }
            PolicyName::Adakv => {
                let mut options = AdaKv::default();
                left.take_saliency(&mut options.saliency);
                take(&mut left.retention, &mut options.retention);
                take(&mut left.floor, &mut options.floor);
                Policy::AdaKv(options)
            }
            PolicyName::Headkv => {
                let mut options = HeadKv::default();
                left.take_saliency(&mut options.saliency);
                take(&mut left.retention, &mut options.retention);
                take(&mut left.heads, &mut options.heads);
                take(&mut left.pooled, &mut options.pooled);
                Policy::HeadKv(options)
            }
            PolicyName::H2o => {
                let mut options = H2o::default();
                take(&mut left.window, &mut options.window);
                take(&mut left.retention, &mut options.retention);
                Policy::H2o(options)
            }
            PolicyName::Fastgen => {
                let mut options = FastGen::default();
                take(&mut left.recovery, &mut options.recovery);
                take(&mut left.local, &mut options.local);
                take(&mut left.frequent, &mut options.frequent);
                Policy::FastGen(options)
            }
            PolicyName::Gemfilter => {
                let mut options =
                    GemFilter { filter_layer: left.filter_layer.take(), ..GemFilter::default() };
                take(&mut left.retention, &mut options.retention);
                left.take_pooling(&mut options.pooling);
                Policy::GemFilter(options)
            }
            PolicyName::Pyramidinfer => {
                let mut options = PyramidInfer::default();
                take(&mut left.recent, &mut options.recent);
                take(&mut left.decay, &mut options.decay);
                Policy::PyramidInfer(options)
            }
            PolicyName::Streamingllm => {
                let mut options = StreamingLlm::default();
                take(&mut left.retention, &mut options.retention);
                take(&mut left.sinks, &mut options.sinks);
                Policy::StreamingLlm(options)
            }
            PolicyName::Random => {
                let mut options = Random::default();
                take(&mut left.retention, &mut options.retention);
                take(&mut left.window, &mut options.window);
                take(&mut left.seed, &mut options.seed);
                Policy::Random(options)
            }
            // Beside it only composed ones are left, and those were made above.
            _ => Policy::Full,
        };
        (policy, left)
    }

    fn take_fastkv(&mut self, mut options: FastKv) -> FastKv {
        self.take_saliency(&mut options.saliency);
        take(&mut self.retention, &mut options.retention);
        take(&mut self.propagation, &mut options.propagation);
        let (tsp_layer, settling) = (&mut options.tsp_layer, &mut options.settling);
        TspLayer::take(&mut self.tsp_layer, &mut self.tsp_overlap, tsp_layer, settling);
        options
    }

    fn take_saliency(&mut self, saliency: &mut Saliency) {
        take(&mut self.window, &mut saliency.window);
        self.take_pooling(&mut saliency.pooling);
    }

    fn take_pooling(&mut self, pooling: &mut policy::Pooling) {
        take(&mut self.kernel, &mut pooling.kernel);
        if let Some(kind) = self.pooling.take() {
            pooling.kind = match kind {
                Pooling::Max => PoolingKind::Max,
                Pooling::Average => PoolingKind::Average,
            };
        }
    }

    /// Names of the options that were given.
    fn given(&self) -> Vec<&'static str> {
        let given = [
            ("retention", self.retention.is_some()),
            ("propagation", self.propagation.is_some()),
            ("window", self.window.is_some()),
            ("pooling", self.pooling.is_some()),
            ("kernel", self.kernel.is_some()),
            ("tsp-layer", self.tsp_layer.is_some()),
            ("tsp-overlap", self.tsp_overlap.is_some()),
            ("steepness", self.steepness.is_some()),
            ("floor", self.floor.is_some()),
            ("heads", self.heads.is_some()),
            ("pooled", self.pooled.is_some()),
            ("recovery", self.recovery.is_some()),
            ("local", self.local.is_some()),
            ("frequent", self.frequent.is_some()),
            ("filter-layer", self.filter_layer.is_some()),
            ("recent", self.recent.is_some()),
            ("decay", self.decay.is_some()),
            ("sinks", self.sinks.is_some()),
            ("seed", self.seed.is_some()),
        ];
        given.into_iter().filter_map(|(name, given)| given.then_some(name)).collect()
    }

    /// The options that a policy takes out of all there are.
    fn options_of(name: PolicyName) -> String {
        let all = Self {
            retention: Some(Budget::Tokens(0)),
            propagation: Some(Budget::Tokens(0)),
            window: Some(0),
            pooling: Some(Pooling::Max),
            kernel: Some(0),
            tsp_layer: Some(TspLayer::Auto(None)),
            tsp_overlap: Some(0.0),
            steepness: Some(0.0),
            floor: Some(0.0),
            heads: Some(HeadScores::default()),
            pooled: Some(0.0),
            recovery: Some(0.0),
            local: Some(0.0),
            frequent: Some(0.0),
            filter_layer: Some(0),
            recent: Some(0.0),
            decay: Some(0.0),
            sinks: Some(0),
            seed: Some(0),
            no_shortcuts: false,
        };
        let unused = all.apply(name).1.given();
        let used = all.given().into_iter().filter(|option| !unused.contains(option));
        let used: Vec<String> = used.map(|option| format!("--{option}")).collect();
        if used.is_empty() { "no options".to_owned() } else { used.join(", ") }
    }
}

fn take<T>(option: &mut Option<T>, field: &mut T) {
    if let Some(value) = option.take() {
        *field = value;
    }
}

/// A whole number is tokens, any other number a rate; its range is the policy's to check.
pub(crate) fn budget(text: &str) -> Result<Budget, String> {
    let tokens = text.parse().map(Budget::Tokens).ok();
    tokens.or_else(|| text.parse().map(Budget::Rate).ok()).ok_or_else(|| {
        "give a share of the prompt as a rate above 0 and at most 1, written with a point (0.1), \
         or a number of tokens (512)"
            .to_owned()
    })
}

/// Head scores that lie in a model's directory.
pub(crate) const HEAD_SCORES: &str = "head_scores.json";

/// Special tokens, and those whose text is punctuation, blanks aside.
fn token_classes(tokenizer: &Tokenizer, vocabulary: usize) -> Result<TokenClasses> {
    let mut classes = TokenClasses::default();
    for id in 0..vocabulary as u32 {
        if tokenizer.is_special(id) {
            classes.special.insert(id);
            continue;
        }
        let text = tokenizer.decode(&[id], false)?;
        let is_mark = |char: char| {
            !(char.is_alphanumeric() || char.is_control() || char == char::REPLACEMENT_CHARACTER)
        };
        if !text.trim().is_empty() && text.trim().chars().all(is_mark) {
            classes.punctuation.insert(id);
        }
    }
    Ok(classes)
}

/// Reads a file of head scores.
pub(crate) fn head_scores(file: &str) -> Result<HeadScores, String> {
    let text = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
    serde_json::from_slice(&text).map_err(|error| format!("{file}: {error}"))
}

#[cfg(test)]
mod tests {
    use fastkv::policy::Settling;

    use super::*;

    #[test]
    fn budgets_are_rates_or_tokens() {
        assert_eq!(budget("512"), Ok(Budget::Tokens(512)));
        assert_eq!(budget("1"), Ok(Budget::Tokens(1)));
        assert_eq!(budget("1.0"), Ok(Budget::Rate(1.0)));
        assert_eq!(budget("-0.5"), Ok(Budget::Rate(-0.5)), "out of range, which the policy says");
        assert!(budget("much").is_err());
    }

    #[test]
    fn tsp_layers_are_for_whom_they_concern() {
        let (candidates, overlap) = (TspLayer::Auto(Some((1, 3))), Some(0.5));
        let options =
            PolicyOptions { tsp_layer: Some(candidates), tsp_overlap: overlap, ..Default::default() };
        let settling = Some(Settling { first: Some(1), overlap: 0.5 });
        let expected = FastKv { tsp_layer: Some(3), settling, ..FastKv::default() };
        assert_eq!(options.policies(&[PolicyName::Fastkv]).expect("candidates"), [Policy::FastKv(expected)]);
        let composed = options.policies(&[PolicyName::FastkvH2o]).expect("candidates");
        let Policy::Tsp(tsp) = &composed[0] else { panic!("composed") };
        assert_eq!((tsp.tsp_layer, tsp.settling), (Some(3), settling));
        let fixed = PolicyOptions { tsp_layer: Some(TspLayer::Fixed(3)), ..options };
        assert!(fixed.policies(&[PolicyName::Fastkv]).is_err(), "nothing overlaps");
    }

    #[test]
    fn every_policy_takes_its_options_and_refuses_others() {
        let options =
            PolicyOptions { retention: Some(Budget::Tokens(64)), sinks: Some(2), ..Default::default() };
        let expected = StreamingLlm { sinks: 2, retention: Budget::Tokens(64) };
        let policies = options.policies(&[PolicyName::Streamingllm]).expect("it has both");
        assert_eq!(policies, [Policy::StreamingLlm(expected)]);

        let error = options.policies(&[PolicyName::Snapkv]).expect_err("it has no sinks").to_string();
        assert_eq!(
            error,
            "--sinks is not an option here: snapkv has --retention, --window, --pooling, --kernel"
        );
        let error = options.policies(&[PolicyName::Full]).expect_err("it has none").to_string();
        assert_eq!(error, "--retention is not an option here: full has no options");
    }

    #[test]
    fn in_company_an_option_needs_one_taker() {
        let options =
            PolicyOptions { retention: Some(Budget::Tokens(64)), sinks: Some(2), ..Default::default() };
        let names = [PolicyName::Full, PolicyName::Fastkv, PolicyName::Streamingllm];
        assert_eq!(options.policies(&names).expect("both are taken").len(), 3);
        assert!(options.policies(&names[..2]).is_err(), "nobody has sinks");
    }
}
