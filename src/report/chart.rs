//! Pictures of several panels with one legend: lines over an axis, and heat maps.

use super::markup::{escape, push};
use super::scale::Scale;

/// A picture, to be drawn as SVG: well-formed XML that loads nothing and follows the reader's light or
/// dark scheme.
#[derive(Clone, Debug)]
pub struct Picture {
    pub(super) title: String,
    pub(super) subtitle: String,
    /// Styles of lines and what they stand for.
    pub(super) legend: Vec<Entry>,
    pub(super) panels: Vec<Panel>,
}

/// A line of the legend.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) style: usize,
    pub(super) dashed: bool,
    pub(super) name: String,
}

#[derive(Clone, Debug)]
pub(super) enum Panel {
    Lines(Lines),
    Heat(Heat),
}

/// Series over a common axis.
#[derive(Clone, Debug)]
pub(super) struct Lines {
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
}

#[derive(Clone, Debug)]
pub(super) struct Axis {
    pub(super) label: String,
    pub(super) scale: Scale,
    /// Spells a tick.
    pub(super) spell: fn(f64) -> String,
}

#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) name: String,
    /// Colour and mark; equal numbers look alike in every picture.
    pub(super) style: usize,
    /// Without marks, as bounds are drawn.
    pub(super) dashed: bool,
    /// In the order in which they are joined.
    pub(super) points: Vec<Point>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    /// Ends of the error bar.
    pub(super) range: Option<[f64; 2]>,
}

/// A table of shares in percent, shaded.
#[derive(Clone, Debug)]
pub(super) struct Heat {
    pub(super) title: String,
    pub(super) x_label: String,
    pub(super) y_label: String,
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<String>,
    /// Row by row; a cell may be missing.
    pub(super) cells: Vec<Vec<Option<Cell>>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cell {
    /// From 0 to 100.
    pub(super) percent: f64,
    /// Values that it is the mean of.
    pub(super) count: usize,
}

// Pixels.
const MARGIN: f64 = 24.0;
const PANEL: [f64; 2] = [480.0, 320.0];
/// Of a panel, around the plot: left, top, right, bottom.
const AROUND: [f64; 4] = [64.0, 36.0, 20.0, 52.0];
const COLUMNS: usize = 2;
const HEADER: f64 = 56.0;
const LEGEND_LINE: f64 = 20.0;
/// Text is not measured here: a wide average of a character at 12 pixels.
const CHARACTER: f64 = 6.6;

/// Colours that differ for every kind of colour vision; marks differ beside them.
const COLOURS: usize = 7;
const MARKS: [&str; 6] = [
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "m-3.6 -3.6h7.2v7.2h-7.2z",
    "m0 -4.6l4.4 7.8h-8.8z",
    "m0 -5l5 5l-5 5l-5 -5z",
    "m0 4.6l4.4 -7.8h-8.8z",
    "m-1.5 -4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
];

/// After Okabe and Ito, darker on white and lighter on black; the first one is the ink's.
pub(super) const STYLE: &str = "\
.paper{fill:#fff}.ink{fill:#1b1f24}.soft{fill:#59636e}.line{stroke:#59636e;fill:none}\
.grid{stroke:#d8dee4;fill:none}.curve{stroke-width:1.8}.bound{stroke-dasharray:5 4}\
.c0{stroke:#1b1f24;fill:#1b1f24}.c1{stroke:#0b65b8;fill:#0b65b8}.c2{stroke:#c64f00;fill:#c64f00}\
.c3{stroke:#007a59;fill:#007a59}.c4{stroke:#a8437f;fill:#a8437f}.c5{stroke:#8a6a00;fill:#8a6a00}\
.c6{stroke:#2b8cc4;fill:#2b8cc4}.heat{fill:#0b5cc4}.none{fill:none;stroke:#d8dee4}.over{fill:#fff}\
.curve{fill:none}\
@media(prefers-color-scheme:dark){\
.paper{fill:#0f1318}.ink{fill:#e8edf2}.soft{fill:#9aa5b1}.line{stroke:#9aa5b1}.grid{stroke:#2b343e}\
.c0{stroke:#e8edf2;fill:#e8edf2}.c1{stroke:#6cb0ff;fill:#6cb0ff}.c2{stroke:#ff9d5c;fill:#ff9d5c}\
.c3{stroke:#2fcf9f;fill:#2fcf9f}.c4{stroke:#f0a3cf;fill:#f0a3cf}.c5{stroke:#e3c54a;fill:#e3c54a}\
.c6{stroke:#9fdcff;fill:#9fdcff}.heat{fill:#6cb0ff}.none{stroke:#2b343e}.over{fill:#0f1318}\
.curve{fill:none}}";

impl Picture {
    /// An SVG file.
    pub fn svg(&self) -> String {
        let columns = self.panels.len().clamp(1, COLUMNS);
        let width = 2.0 * MARGIN + columns as f64 * PANEL[0];
        let legend = self.legend_places(width);
        let legend_lines = legend.last().map_or(0, |(_, line)| line + 1);
        let top = HEADER + legend_lines as f64 * LEGEND_LINE + 8.0;
        let height = top + self.panels.len().div_ceil(columns) as f64 * PANEL[1] + MARGIN / 2.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" role=\"img\" font-family=\"system-ui, sans-serif\">\n\
             <title>{title}</title>\n<style>{STYLE}</style>\n\
             <rect class=\"paper\" width=\"{width}\" height=\"{height}\"/>\n\
             <text class=\"ink\" x=\"{MARGIN}\" y=\"26\" font-size=\"16\" font-weight=\"600\">{title}</text>\n\
             <text class=\"soft\" x=\"{MARGIN}\" y=\"45\" font-size=\"12\">{subtitle}</text>\n",
            title = escape(&self.title),
            subtitle = escape(&self.subtitle),
        );
        for (entry, (x, line)) in self.legend.iter().zip(&legend) {
            entry.draw(&mut svg, *x, HEADER + 12.0 + *line as f64 * LEGEND_LINE);
        }
        for (index, panel) in self.panels.iter().enumerate() {
            let left = MARGIN + (index % columns) as f64 * PANEL[0];
            let place = Place::new(left, top + (index / columns) as f64 * PANEL[1]);
            match panel {
                Panel::Lines(lines) => lines.draw(&mut svg, &place),
                Panel::Heat(heat) => heat.draw(&mut svg, &place),
            }
        }
        svg.push_str("</svg>\n");
        svg
    }

    /// For each entry of the legend its left end and its line.
    fn legend_places(&self, width: f64) -> Vec<(f64, usize)> {
        let (mut x, mut line) = (MARGIN, 0);
        let place = |entry: &Entry| {
            let wide = 44.0 + CHARACTER * entry.name.chars().count() as f64;
            if x > MARGIN && x + wide > width - MARGIN {
                (x, line) = (MARGIN, line + 1);
            }
            let place = (x, line);
            x += wide;
            place
        };
        self.legend.iter().map(place).collect()
    }
}

impl Entry {
    fn draw(&self, svg: &mut String, x: f64, y: f64) {
        let colour = self.style % COLOURS;
        let bound = if self.dashed { " bound" } else { "" };
        push(svg, format_args!("<path class=\"c{colour} curve{bound}\" d=\"M{x:.1} {y:.1}h24\"/>"));
        if !self.dashed {
            mark(svg, self.style, x + 12.0, y);
        }
        push(
            svg,
            format_args!(
                "<text class=\"ink\" x=\"{:.1}\" y=\"{:.1}\" font-size=\"12\">{}</text>\n",
                x + 30.0,
                y + 4.0,
                escape(&self.name)
            ),
        );
    }
}

fn mark(svg: &mut String, style: usize, x: f64, y: f64) {
    let [colour, mark] = [style % COLOURS, style % MARKS.len()];
    push(svg, format_args!("<path class=\"c{colour} mark\" d=\"M{x:.2} {y:.2}{}\"/>", MARKS[mark]));
}

/// Where a panel's plot lies.
struct Place {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

impl Place {
    fn new(left: f64, top: f64) -> Self {
        Self {
            left: left + AROUND[0],
            top: top + AROUND[1],
            right: left + PANEL[0] - AROUND[2],
            bottom: top + PANEL[1] - AROUND[3],
        }
    }

    fn x(&self, share: f64) -> f64 {
        self.left + share * (self.right - self.left)
    }

    fn y(&self, share: f64) -> f64 {
        self.bottom - share * (self.bottom - self.top)
    }

    fn title(&self, svg: &mut String, title: &str) {
        text(svg, "ink", [self.left, self.top - 12.0], "start", 13.0, title);
    }

    fn labels(&self, svg: &mut String, x: &str, y: &str) {
        text(svg, "soft", [(self.left + self.right) / 2.0, self.bottom + 40.0], "middle", 12.0, x);
        push(
            svg,
            format_args!(
                "<text class=\"soft\" transform=\"translate({:.1} {:.1}) rotate(-90)\" font-size=\"12\" \
                 text-anchor=\"middle\">{}</text>\n",
                self.left - 50.0,
                (self.top + self.bottom) / 2.0,
                escape(y)
            ),
        );
    }
}

fn text(svg: &mut String, class: &str, at: [f64; 2], anchor: &str, size: f64, text: &str) {
    push(
        svg,
        format_args!(
            "<text class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" font-size=\"{size}\" \
             text-anchor=\"{anchor}\">{}</text>\n",
            at[0],
            at[1],
            escape(text)
        ),
    );
}

impl Lines {
    fn draw(&self, svg: &mut String, place: &Place) {
        place.title(svg, &self.title);
        let Place { left, top, right, bottom } = *place;
        for tick in &self.x.scale.ticks {
            let Some(x) = self.x.scale.place(*tick).map(|share| place.x(share)) else { continue };
            push(svg, format_args!("<path class=\"grid\" d=\"M{x:.2} {top:.2}V{bottom:.2}\"/>"));
            text(svg, "ink", [x, bottom + 17.0], "middle", 11.0, &(self.x.spell)(*tick));
        }
        for tick in &self.y.scale.ticks {
            let Some(y) = self.y.scale.place(*tick).map(|share| place.y(share)) else { continue };
            push(svg, format_args!("<path class=\"grid\" d=\"M{left:.2} {y:.2}H{right:.2}\"/>"));
            text(svg, "ink", [left - 7.0, y + 4.0], "end", 11.0, &(self.y.spell)(*tick));
        }
        push(svg, format_args!("<path class=\"line\" d=\"M{left:.2} {top:.2}V{bottom:.2}H{right:.2}\"/>\n"));
        place.labels(svg, &self.x.label, &self.y.label);
        // Bounds lie below what was measured.
        let (bounds, measured): (Vec<_>, Vec<_>) = self.series.iter().partition(|series| series.dashed);
        bounds.into_iter().chain(measured).for_each(|series| self.draw_series(svg, place, series));
    }

    fn draw_series(&self, svg: &mut String, place: &Place, series: &Series) {
        let colour = series.style % COLOURS;
        let x_of = |value| self.x.scale.place(value).map(|share| place.x(share));
        let y_of = |value| self.y.scale.place(value).map(|share| place.y(share));
        let places: Vec<(f64, f64, &Point)> =
            series.points.iter().filter_map(|point| Some((x_of(point.x)?, y_of(point.y)?, point))).collect();
        if places.len() > 1 {
            let mut path = String::new();
            for (index, (x, y, _)) in places.iter().enumerate() {
                push(&mut path, format_args!("{}{x:.2} {y:.2}", if index == 0 { 'M' } else { 'L' }));
            }
            let bound = if series.dashed { " bound" } else { "" };
            push(svg, format_args!("<path class=\"c{colour} curve{bound}\" d=\"{path}\"/>\n"));
        }
        for (x, y, point) in places {
            let around = point.range.map_or(String::new(), |[low, high]| {
                format!(" ({} to {})", (self.y.spell)(low), (self.y.spell)(high))
            });
            push(
                svg,
                format_args!(
                    "<g><title>{}: {} at {}{around}</title>",
                    escape(&series.name),
                    escape(&(self.y.spell)(point.y)),
                    escape(&(self.x.spell)(point.x)),
                ),
            );
            if let Some([low, high]) = point.range
                && let (Some(low), Some(high)) = (y_of(low), y_of(high))
            {
                push(
                    svg,
                    format_args!(
                        "<path class=\"c{colour} curve\" d=\"M{:.2} {low:.2}h6m-3 0V{high:.2}m-3 0h6\"/>",
                        x - 3.0
                    ),
                );
            }
            if series.dashed {
                push(
                    svg,
                    format_args!("<circle class=\"c{colour}\" cx=\"{x:.2}\" cy=\"{y:.2}\" r=\"1.5\"/>"),
                );
            } else {
                mark(svg, series.style, x, y);
            }
            svg.push_str("</g>\n");
        }
    }
}

impl Heat {
    fn draw(&self, svg: &mut String, place: &Place) {
        place.title(svg, &self.title);
        place.labels(svg, &self.x_label, &self.y_label);
        let wide = (place.right - place.left) / self.columns.len().max(1) as f64;
        let high = (place.bottom - place.top) / self.rows.len().max(1) as f64;
        let center = |index: usize| (index as f64 + 0.5) * wide + place.left;
        let every = (30.0 / wide).ceil().max(1.0) as usize;
        for (index, column) in self.columns.iter().enumerate().step_by(every) {
            text(svg, "ink", [center(index), place.bottom + 17.0], "middle", 11.0, column);
        }
        let every = (12.0 / high).ceil().max(1.0) as usize;
        for (index, row) in self.rows.iter().enumerate().step_by(every) {
            let y = place.top + (index as f64 + 0.5) * high + 4.0;
            text(svg, "ink", [place.left - 7.0, y], "end", 11.0, row);
        }
        for (row, cells) in self.cells.iter().enumerate() {
            for (column, cell) in cells.iter().enumerate() {
                let (x, y) = (place.left + column as f64 * wide, place.top + row as f64 * high);
                let label = format!("{}, {}", self.columns[column], self.rows[row]);
                let size = format!(
                    "x=\"{:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{:.2}\"",
                    x + 0.5,
                    y + 0.5,
                    (wide - 1.0).max(0.5),
                    (high - 1.0).max(0.5)
                );
                let Some(Cell { percent, count }) = cell else {
                    push(
                        svg,
                        format_args!(
                            "<g><title>{}: not asked</title><rect class=\"none\" {size}/></g>\n",
                            escape(&label)
                        ),
                    );
                    continue;
                };
                let shade = shade(*percent);
                push(
                    svg,
                    format_args!(
                        "<g><title>{}: {percent:.1} (n = {count})</title>\
                         <rect class=\"heat\" fill-opacity=\"{shade:.3}\" {size}/>",
                        escape(&label)
                    ),
                );
                if wide >= 24.0 && high >= 12.0 {
                    let class = if shade > 0.7 { "over" } else { "ink" };
                    let at = [center(column), y + high / 2.0 + 4.0];
                    text(svg, class, at, "middle", 11.0, &format!("{percent:.0}"));
                }
                svg.push_str("</g>\n");
            }
        }
    }
}

/// How strongly a cell is shaded: nought can be seen, too.
fn shade(percent: f64) -> f64 {
    0.06 + 0.94 * (percent / 100.0).clamp(0.0, 1.0)
}
