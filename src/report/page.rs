//! One HTML page of all results in a directory.

use std::collections::HashSet;
use std::path::Path;

use super::accuracy;
use super::markup::{escape, push};
use super::results::{Found, ReportError, Results, read_directory};
use super::section::{Section, Styles, Table};

/// Results, drawn.
#[derive(Debug)]
pub struct Report {
    sections: Vec<Section>,
    ignored: Vec<(String, String)>,
}

impl Report {
    /// Reads all results that lie in a directory, those below it not included.
    ///
    /// # Errors
    /// A directory or file that cannot be read, one that calls itself results and is broken, or no results at all.
    pub fn of_directory(directory: &Path) -> Result<Self, ReportError> {
        let Found { files, ignored } = read_directory(directory)?;
        let mut styles = Styles::default();
        let section = |(name, results): &(String, Results)| match results {
            Results::Bench(bench) => bench.section(name, &mut styles),
            Results::Evaluation(evaluation) => accuracy::section(name, evaluation, &mut styles),
            Results::Inspection(inspection) => inspection.section(name),
        };
        let mut sections: Vec<Section> = files.iter().map(section).collect();
        let mut taken = HashSet::new();
        for ((file, _), section) in files.iter().zip(&mut sections) {
            let stem = file.strip_suffix(".jsonl").or(file.strip_suffix(".json")).unwrap_or(file);
            for figure in &mut section.figures {
                figure.name = free_name(&format!("{stem}-{}", figure.name), &mut taken);
            }
        }
        Ok(Self { sections, ignored })
    }

    /// Each picture by itself: a file name and its SVG. Names are plain and differ.
    pub fn pictures(&self) -> impl Iterator<Item = (&str, &str)> {
        let figures = self.sections.iter().flat_map(|section| &section.figures);
        figures.map(|figure| (figure.name.as_str(), figure.svg.as_str()))
    }

    /// How many files of results there are, and which others are not read, with what they lack.
    pub fn files(&self) -> (usize, &[(String, String)]) {
        (self.sections.len(), &self.ignored)
    }

    /// The page: well-formed XML, too; it loads nothing and runs nothing.
    pub fn html(&self) -> String {
        let mut html = format!(
            "<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\">\n<head>\n\
             <meta charset=\"utf-8\"/>\n<meta name=\"viewport\" content=\"width=device-width\"/>\n\
             <title>fastkv: results</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n\
             <h1>fastkv: results</h1>\n<nav><ul>\n"
        );
        for (index, section) in self.sections.iter().enumerate() {
            let title = escape(&section.title);
            push(&mut html, format_args!("<li><a href=\"#s{index}\">{title}</a></li>\n"));
        }
        html.push_str("</ul></nav>\n");
        for (index, section) in self.sections.iter().enumerate() {
            section.html(&mut html, index);
        }
        if !self.ignored.is_empty() {
            html.push_str("<h2>Files that are no results</h2>\n<ul>\n");
            for (name, reason) in &self.ignored {
                push(&mut html, format_args!("<li>{} {}</li>\n", escape(name), escape(reason)));
            }
            html.push_str("</ul>\n");
        }
        html.push_str("</body>\n</html>\n");
        html
    }
}

/// A file name without anything that a file system or a shell would stumble on, and that none has yet.
fn free_name(wanted: &str, taken: &mut HashSet<String>) -> String {
    let plain = |char: char| if char.is_ascii_alphanumeric() || "-_.".contains(char) { char } else { '_' };
    let name: String = wanted.trim_start_matches('.').chars().map(plain).take(120).collect();
    let names =
        std::iter::once(format!("{name}.svg")).chain((2..).map(|number| format!("{name}-{number}.svg")));
    let mut names = names.skip_while(|name| taken.contains(name));
    let name = names.next().unwrap_or_default();
    taken.insert(name.clone());
    name
}

impl Section {
    fn html(&self, html: &mut String, index: usize) {
        push(html, format_args!("<section id=\"s{index}\">\n<h2>{}</h2>\n<dl>\n", escape(&self.title)));
        for (name, value) in &self.facts {
            push(html, format_args!("<dt>{}</dt><dd>{}</dd>\n", escape(name), escape(value)));
        }
        html.push_str("</dl>\n");
        for note in &self.notes {
            push(html, format_args!("<p class=\"note\">{}</p>\n", escape(note)));
        }
        for figure in &self.figures {
            push(html, format_args!("<figure>\n{}</figure>\n", figure.svg));
        }
        self.tables.iter().for_each(|table| table.html(html));
        html.push_str("</section>\n");
    }
}

impl Table {
    fn html(&self, html: &mut String) {
        let class = |column: usize| if column < self.words { " class=\"w\"" } else { "" };
        push(
            html,
            format_args!(
                "<div class=\"table\"><table>\n<caption>{}</caption>\n<thead><tr>",
                escape(&self.caption)
            ),
        );
        for (column, name) in self.header.iter().enumerate() {
            push(html, format_args!("<th{}>{}</th>", class(column), escape(name)));
        }
        html.push_str("</tr></thead>\n<tbody>\n");
        for row in &self.rows {
            html.push_str("<tr>");
            for (column, cell) in row.iter().enumerate() {
                push(html, format_args!("<td{}>{}</td>", class(column), escape(cell)));
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</tbody>\n</table></div>\n");
    }
}

const PAGE_STYLE: &str = "\
:root{color-scheme:light dark}\
body{font-family:system-ui,sans-serif;margin:1.5rem;background:#fff;color:#1b1f24;max-width:1120px}\
h1{font-size:1.4rem}h2{font-size:1.15rem;margin-top:2.5rem}\
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;font-size:.85rem}\
dt{color:#59636e}dd{margin:0;overflow-wrap:anywhere}\
figure{margin:1rem 0;overflow-x:auto}figure svg{max-width:100%;height:auto}\
.table{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-size:.8rem;\
font-variant-numeric:tabular-nums}caption{text-align:left;font-weight:600;padding:.3rem 0}\
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #d8dee4;vertical-align:top}\
.w{text-align:left;overflow-wrap:anywhere}.note{color:#9a3c00}a{color:#0b65b8}\
@media(prefers-color-scheme:dark){body{background:#0f1318;color:#e8edf2}dt{color:#9aa5b1}\
th,td{border-color:#2b343e}.note{color:#ff9d5c}a{color:#6cb0ff}}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_plain_and_differ() {
        let mut taken = HashSet::new();
        let mut name = |wanted: &str| free_name(wanted, &mut taken);
        assert_eq!(name("a b/../<c>-needle"), "a_b_..__c_-needle.svg");
        assert_eq!(name("x-needle"), "x-needle.svg");
        assert_eq!(name("x-needle"), "x-needle-2.svg");
        assert_eq!(name(".hidden"), "hidden.svg");
        assert!(name(&"long".repeat(100)).len() < 140);
    }
}
