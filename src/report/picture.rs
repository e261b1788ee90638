//! Kept tokens over the prompt: layers and kv heads as rows, positions as columns.

use super::markup::{escape, push};
use crate::engine::Trace;
use crate::messages::count;
use crate::policy::{Budget, Policy};

/// What a prefill kept, to be drawn as SVG or HTML. Both are self-contained, well-formed XML, and
/// follow the reader's light or dark scheme.
#[derive(Clone, Copy, Debug)]
pub struct KeptPicture<'a> {
    /// The policy and its budget; see [`describe`].
    pub title: &'a str,
    /// What else is to be known, such as the model and the size of the cache.
    pub subtitle: &'a str,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// What was kept.
    pub trace: &'a Trace,
}

/// A policy with its options, in a line.
pub fn describe(policy: &Policy) -> String {
    let budget = |budget: Budget| match budget {
        Budget::Tokens(tokens) => count(tokens, "token"),
        Budget::Rate(rate) => format!("{rate} of the prompt"),
    };
    match policy {
        Policy::Full => "full context".to_owned(),
        Policy::FastKv(options) => format!(
            "FastKV: retention {}, propagation {}{}, {}",
            budget(options.retention),
            budget(options.propagation),
            if options.settling.is_some() { " where it settles" } else { "" },
            options.saliency
        ),
        Policy::SnapKv(options) => {
            format!("SnapKV: retention {}, {}", budget(options.retention), options.saliency)
        }
        Policy::PyramidKv(options) => format!(
            "PyramidKV: retention {} on average, steepness {}, {}",
            budget(options.retention),
            options.steepness,
            options.saliency
        ),
        Policy::AdaKv(options) => format!(
            "AdaKV: retention {} on average, floor {}, {}",
            budget(options.retention),
            options.floor,
            options.saliency
        ),
        Policy::HeadKv(options) => format!(
            "HeadKV: retention {} on average, pooled {}, {}",
            budget(options.retention),
            options.pooled,
            options.saliency
        ),
        Policy::H2o(options) => {
            format!("H2O: retention {}, window {}", budget(options.retention), options.window)
        }
        Policy::FastGen(options) => format!(
            "FastGen: recovery {}, local {}, frequent {}",
            options.recovery, options.local, options.frequent
        ),
        Policy::GemFilter(options) => {
            format!("GemFilter: retention {}, {}", budget(options.retention), options.pooling)
        }
        Policy::PyramidInfer(options) => {
            format!("PyramidInfer: recent {}, decay {}", options.recent, options.decay)
        }
        Policy::StreamingLlm(options) => {
            format!("StreamingLLM: retention {}, {}", budget(options.retention), count(options.sinks, "sink"))
        }
        Policy::Tsp(options) => {
            format!("TSP {}, caches of {}", budget(options.propagation), describe(&options.cache))
        }
        Policy::Random(options) => format!(
            "random choice: retention {}, window {}, seed {}",
            budget(options.retention),
            options.window,
            options.seed
        ),
    }
}

impl KeptPicture<'_> {
    /// An SVG file.
    pub fn svg(&self) -> String {
        let rows = Rows::new(self.trace);
        let [width, height] = [LEFT + PLOT + RIGHT, TOP + rows.height() + BOTTOM];
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height:.1}\" width=\"{width}\" \
             height=\"{height:.1}\" role=\"img\" font-family=\"system-ui, sans-serif\">\n\
             <title>{title}</title>\n<style>{STYLE}</style>\n\
             <rect class=\"paper\" width=\"{width}\" height=\"{height:.1}\"/>\n\
             <text class=\"ink\" x=\"{LEFT}\" y=\"24\" font-size=\"16\" font-weight=\"600\">{title}</text>\n\
             <text class=\"soft\" x=\"{LEFT}\" y=\"43\" font-size=\"12\">{subtitle}</text>\n",
            title = escape(self.title),
            subtitle = escape(self.subtitle),
        );
        self.legend(&mut svg);
        let bins = Bins::new(self.prompt_tokens);
        let mut reads: Option<&[u32]> = None;
        let mut y = TOP;
        for (index, layer) in self.trace.layers.iter().enumerate() {
            let block = rows.row * layer.kept.len() as f64;
            self.layer_labels(&mut svg, &rows, index, y + block / 2.0);
            for (head, kept) in layer.kept.iter().enumerate() {
                let mass = layer.mass.get(head).map_or(String::new(), |mass| format!(", mass {mass:.3}"));
                push(
                    &mut svg,
                    format_args!(
                        "<g><title>layer {index}, kv head {head}: kept {} of {}{mass}</title>\n",
                        kept.len(),
                        layer.rows
                    ),
                );
                let height = rows.row - rows.gap();
                match reads {
                    None => push(
                        &mut svg,
                        format_args!(
                            "<rect class=\"read\" x=\"{LEFT}\" y=\"{y:.2}\" width=\"{PLOT}\" \
                             height=\"{height:.2}\"/>\n"
                        ),
                    ),
                    Some(reads) => bins.paths(&mut svg, reads, "read", 1, y, height),
                }
                bins.paths(&mut svg, kept, "kept", LEVELS, y, height);
                svg.push_str("</g>\n");
                y += rows.row;
            }
            if let Some(propagated) = &layer.propagated {
                push(
                    &mut svg,
                    format_args!(
                        "<g><title>{} tokens go on past layer {index}</title>\n\
                         <text class=\"on\" x=\"{:.1}\" y=\"{:.2}\" font-size=\"10\" \
                         text-anchor=\"end\">go on</text>\n",
                        propagated.len(),
                        LEFT - 8.0,
                        y + STRIP - 4.0,
                    ),
                );
                bins.paths(&mut svg, propagated, "on", 1, y + 2.0, STRIP - 5.0);
                svg.push_str("</g>\n");
                y += STRIP;
                reads = Some(propagated);
            }
            y += LAYER_GAP;
        }
        self.axes(&mut svg, y);
        svg.push_str("</svg>\n");
        svg
    }

    /// An HTML page: the picture, and the prompt with each token shaded by how many (layer, kv head)
    /// pairs kept it. `pieces` are the texts of the tokens; a token may have none of its own.
    pub fn html(&self, pieces: &[String]) -> String {
        let heads: usize = self.trace.layers.iter().map(|layer| layer.kept.len()).sum();
        let kept_by = self.kept_by();
        let propagated = self.propagated();
        let mut html = format!(
            "<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\">\n<head>\n\
             <meta charset=\"utf-8\"/>\n<meta name=\"viewport\" content=\"width=device-width\"/>\n\
             <title>{title}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n",
            title = escape(self.title)
        );
        html += &self.svg();
        push(
            &mut html,
            format_args!(
                "<h2>The prompt</h2>\n<p class=\"note\">The stronger the shade of a token, the more of the {heads} \
                 layers × kv heads kept it; the pointer shows its position.{}</p>\n<div class=\"prompt\">",
                if propagated.contains(&true) {
                    " Underlined tokens went on past the TSP layer."
                } else {
                    ""
                }
            ),
        );
        for (position, piece) in pieces.iter().enumerate().take(self.prompt_tokens) {
            let count = kept_by[position];
            let shade = level(count as f64 / heads.max(1) as f64, SHADES);
            let on = if propagated[position] { " on" } else { "" };
            push(
                &mut html,
                format_args!(
                    "<span class=\"s{shade}{on}\" title=\"position {position}: kept by {count} of {heads}\">{}\
                     </span>",
                    escape(piece)
                ),
            );
        }
        html.push_str("</div>\n</body>\n</html>\n");
        html
    }

    /// How many (layer, kv head) pairs kept each position.
    fn kept_by(&self) -> Vec<usize> {
        let mut counts = vec![0; self.prompt_tokens];
        let heads = self.trace.layers.iter().flat_map(|layer| &layer.kept);
        heads.flatten().for_each(|position| counts[*position as usize] += 1);
        counts
    }

    /// Whether each position went on where not all did.
    fn propagated(&self) -> Vec<bool> {
        let mut marks = vec![false; self.prompt_tokens];
        let sets = self.trace.layers.iter().filter_map(|layer| layer.propagated.as_ref());
        sets.flatten().for_each(|position| marks[*position as usize] = true);
        marks
    }

    fn legend(&self, svg: &mut String) {
        let mut x = LEFT;
        let y = 56.0;
        let mut entry = |svg: &mut String, classes: &[String], label: &str| {
            for class in classes {
                push(
                    svg,
                    format_args!(
                        "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"14\" height=\"12\"/>\n"
                    ),
                );
                x += 14.0;
            }
            push(
                svg,
                format_args!(
                    "<text class=\"ink\" x=\"{:.1}\" y=\"{:.1}\" font-size=\"12\">{}</text>\n",
                    x + 6.0,
                    y + 10.0,
                    escape(label)
                ),
            );
            // Text is not measured here; 6.6 is a wide average of a character at this size.
            x += 26.0 + 6.6 * label.chars().count() as f64;
        };
        let shades: Vec<String> = (1..=LEVELS).map(|level| format!("kept k{level}")).collect();
        entry(svg, &shades, "kept: few to all of a column's tokens");
        entry(svg, &["read".to_owned()], "read, not kept");
        if self.trace.layers.iter().any(|layer| layer.propagated.is_some()) {
            entry(svg, &["unread".to_owned()], "not read");
            entry(svg, &["on".to_owned()], "go on past the TSP layer");
        }
    }

    fn layer_labels(&self, svg: &mut String, rows: &Rows, layer: usize, middle: f64) {
        if !layer.is_multiple_of(rows.label_every) {
            return;
        }
        let y = middle + 4.0;
        push(
            svg,
            format_args!(
                "<text class=\"ink\" x=\"{:.1}\" y=\"{y:.2}\" font-size=\"11\" text-anchor=\"end\">{layer}</text>\n",
                LEFT - 8.0
            ),
        );
        let mass = &self.trace.layers[layer].mass;
        if !mass.is_empty() {
            push(
                svg,
                format_args!(
                    "<text class=\"soft\" x=\"{:.1}\" y=\"{y:.2}\" font-size=\"11\">{:.2}</text>\n",
                    LEFT + PLOT + 8.0,
                    mass.iter().sum::<f32>() / mass.len() as f32
                ),
            );
        }
    }

    fn axes(&self, svg: &mut String, bottom: f64) {
        let middle = (TOP + bottom) / 2.0;
        push(
            svg,
            format_args!(
                "<text class=\"soft\" transform=\"translate(16 {middle:.1}) rotate(-90)\" font-size=\"12\" \
                 text-anchor=\"middle\">layer (a row for each kv head)</text>\n\
                 <text class=\"soft\" x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">mass</text>\n\
                 <path class=\"line\" d=\"M{LEFT} {bottom:.1}h{PLOT}\"/>\n",
                LEFT + PLOT + 8.0,
                TOP - 4.0,
            ),
        );
        let step = tick_step(self.prompt_tokens);
        for position in (0..=self.prompt_tokens).step_by(step) {
            let x = LEFT + PLOT * position as f64 / self.prompt_tokens.max(1) as f64;
            push(
                svg,
                format_args!(
                    "<path class=\"line\" d=\"M{x:.1} {bottom:.1}v5\"/><text class=\"ink\" x=\"{x:.1}\" \
                     y=\"{:.1}\" font-size=\"11\" text-anchor=\"middle\">{position}</text>\n",
                    bottom + 18.0
                ),
            );
        }
        push(
            svg,
            format_args!(
                "<text class=\"soft\" x=\"{:.1}\" y=\"{:.1}\" font-size=\"12\" text-anchor=\"middle\">position in \
                 the prompt (tokens)</text>\n",
                LEFT + PLOT / 2.0,
                bottom + 36.0
            ),
        );
    }
}

// Pixels.
const LEFT: f64 = 64.0;
const PLOT: f64 = 960.0;
const RIGHT: f64 = 56.0;
const TOP: f64 = 96.0;
const BOTTOM: f64 = 48.0;
const STRIP: f64 = 14.0;
const LAYER_GAP: f64 = 3.0;

/// Shades of a column by the share of its tokens that were kept.
const LEVELS: usize = 4;
/// Shades of a token by the share of heads that kept it, beside none.
const SHADES: usize = 8;

// Blue and orange differ for every kind of colour vision, and by lightness too.
const STYLE: &str = "\
.paper{fill:#fff}.ink{fill:#1b1f24}.soft{fill:#59636e}.line{stroke:#59636e;fill:none}\
.read{fill:#e6eaf0}.unread{fill:#fff;stroke:#d0d7de}.on{fill:#bc4c00}.kept{fill:#0b5cc4}\
.k1{fill-opacity:.4}.k2{fill-opacity:.6}.k3{fill-opacity:.8}\
@media(prefers-color-scheme:dark){\
.paper{fill:#0f1318}.ink{fill:#e8edf2}.soft{fill:#9aa5b1}.line{stroke:#9aa5b1}\
.read{fill:#232b35}.unread{fill:#0f1318;stroke:#3a444f}.on{fill:#ff9d5c}.kept{fill:#6cb0ff}}";

const PAGE_STYLE: &str = "\
:root{color-scheme:light dark}\
body{font-family:system-ui,sans-serif;margin:1.5rem;background:#fff;color:#1b1f24;max-width:1080px}\
svg{max-width:100%;height:auto}.note{color:#59636e}\
.prompt{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7;font-family:ui-monospace,monospace}\
.prompt span{--kept:11 92 196;border-radius:2px}\
.prompt span:empty{display:inline-block;width:.4em;height:1em}\
.prompt .on{border-bottom:2px solid #bc4c00}\
.s1{background:rgb(var(--kept)/.09)}.s2{background:rgb(var(--kept)/.16)}.s3{background:rgb(var(--kept)/.23)}\
.s4{background:rgb(var(--kept)/.3)}.s5{background:rgb(var(--kept)/.37)}.s6{background:rgb(var(--kept)/.44)}\
.s7{background:rgb(var(--kept)/.51)}.s8{background:rgb(var(--kept)/.58)}\
@media(prefers-color-scheme:dark){body{background:#0f1318;color:#e8edf2}.note{color:#9aa5b1}\
.prompt span{--kept:64 140 235}.prompt .on{border-color:#ff9d5c}}";

/// How rows share the height.
struct Rows {
    row: f64,
    heads: usize,
    layers: usize,
    strips: usize,
    label_every: usize,
}

impl Rows {
    fn new(trace: &Trace) -> Self {
        let layers = trace.layers.len();
        let heads: usize = trace.layers.iter().map(|layer| layer.kept.len()).sum();
        let row = (720.0 / heads.max(1) as f64).clamp(3.0, 16.0);
        let block = row * heads as f64 / layers.max(1) as f64 + LAYER_GAP;
        let strips = trace.layers.iter().filter(|layer| layer.propagated.is_some()).count();
        Self { row, heads, layers, strips, label_every: (12.0 / block).ceil() as usize }
    }

    fn height(&self) -> f64 {
        self.row * self.heads as f64 + LAYER_GAP * self.layers as f64 + STRIP * self.strips as f64
    }

    fn gap(&self) -> f64 {
        if self.row >= 6.0 { 1.0 } else { 0.0 }
    }
}

/// Columns of pixels, each some positions wide or a part of one.
struct Bins {
    tokens: usize,
    columns: usize,
}

impl Bins {
    fn new(tokens: usize) -> Self {
        Self { tokens, columns: tokens.min(PLOT as usize).max(1) }
    }

    /// The share of each column's positions that are in the list.
    fn shares(&self, positions: &[u32]) -> Vec<f64> {
        let mut counts = vec![0_usize; self.columns];
        for position in positions {
            counts[*position as usize * self.columns / self.tokens] += 1;
        }
        // Column c holds the positions from ceil(c · tokens / columns) on.
        let first = |column: usize| (column * self.tokens).div_ceil(self.columns);
        counts
            .iter()
            .enumerate()
            .map(|(column, count)| *count as f64 / (first(column + 1) - first(column)).max(1) as f64)
            .collect()
    }

    /// One path for each shade: runs of columns as boxes.
    fn paths(&self, svg: &mut String, positions: &[u32], class: &str, levels: usize, y: f64, height: f64) {
        let shades: Vec<usize> =
            self.shares(positions).into_iter().map(|share| level(share, levels)).collect();
        let column = PLOT / self.columns as f64;
        for shade in 1..=levels {
            let mut path = String::new();
            let mut start = 0;
            for run in shades.chunk_by(|a, b| a == b) {
                if run[0] == shade {
                    let (x, width) = (LEFT + start as f64 * column, run.len() as f64 * column);
                    push(&mut path, format_args!("M{x:.2} {y:.2}h{width:.2}v{height:.2}h-{width:.2}z"));
                }
                start += run.len();
            }
            if !path.is_empty() {
                let class = if levels > 1 { format!("{class} k{shade}") } else { class.to_owned() };
                push(svg, format_args!("<path class=\"{class}\" d=\"{path}\"/>\n"));
            }
        }
    }
}

/// 0 for none, else 1 to `levels`.
fn level(share: f64, levels: usize) -> usize {
    ((share * levels as f64).ceil() as usize).min(levels)
}

/// 1, 2 or 5 times a power of ten, for six to fifteen ticks.
fn tick_step(tokens: usize) -> usize {
    let steps = (0..).flat_map(|power| [1, 2, 5].map(|digit| digit * 10_usize.pow(power)));
    steps.into_iter().find(|step| tokens / step <= 12).unwrap_or(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::LayerTrace;

    fn trace() -> Trace {
        let layer = |rows, kept: [Vec<u32>; 2], propagated| LayerTrace {
            rows,
            kept: kept.into(),
            mass: vec![0.25, 0.75],
            propagated,
            sets: None,
        };
        Trace {
            layers: vec![
                layer(2000, [vec![0, 1, 1999], vec![5]], Some(vec![0, 1, 2, 1999])),
                layer(4, [vec![0, 1999], vec![2]], None),
            ],
            ..Trace::default()
        }
    }

    fn picture(trace: &Trace) -> KeptPicture<'_> {
        KeptPicture { title: "a <b> & c", subtitle: "\"d\"", prompt_tokens: 2000, trace }
    }

    #[test]
    fn the_svg_shows_every_row_and_mark() {
        let trace = trace();
        let svg = picture(&trace).svg();
        for piece in [
            "<title>a &lt;b&gt; &amp; c</title>",
            "layer 0, kv head 0: kept 3 of 2000, mass 0.250",
            "layer 1, kv head 1: kept 1 of 4, mass 0.750",
            "4 tokens go on past layer 0",
            "not read",
            ">1800</text>",
            ">0.50</text>",
            "prefers-color-scheme:dark",
        ] {
            assert!(svg.contains(piece), "{piece}");
        }
        assert!(!svg.contains("a <b>"));
    }

    #[test]
    fn tokens_are_shaded_by_the_heads_that_kept_them() {
        let trace = trace();
        let pieces: Vec<String> = ["<s>", "&"].map(str::to_owned).into();
        let html = picture(&trace).html(&pieces);
        // Kept by two of four heads, then by one.
        assert!(html.contains("<span class=\"s4 on\" title=\"position 0: kept by 2 of 4\">&lt;s&gt;</span>"));
        assert!(html.contains("<span class=\"s2 on\" title=\"position 1: kept by 1 of 4\">&amp;</span>"));
    }

    #[test]
    fn columns_hold_every_position_once() {
        for tokens in [1, 7, 960, 961, 2000, 12_345] {
            let all: Vec<u32> = (0..tokens as u32).collect();
            let bins = Bins::new(tokens);
            assert!(bins.shares(&all).iter().all(|share| *share == 1.0), "{tokens}");
        }
        assert_eq!(Bins::new(1920).shares(&[0, 2, 3])[..3], [0.5, 1.0, 0.0]);
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!([1, 12, 13, 96, 2000, 4096, 131_072].map(tick_step), [1, 1, 2, 10, 200, 500, 20_000]);
    }
}
