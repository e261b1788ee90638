//! What a report has to say of one file of results.

/// Figures, tables and words.
#[derive(Debug, Default)]
pub(super) struct Section {
    pub(super) title: String,
    /// Settings: name and value.
    pub(super) facts: Vec<(String, String)>,
    pub(super) notes: Vec<String>,
    pub(super) figures: Vec<Figure>,
    pub(super) tables: Vec<Table>,
}

/// A picture, and what its file is called behind the name of the results.
#[derive(Debug)]
pub(super) struct Figure {
    pub(super) name: String,
    pub(super) svg: String,
}

#[derive(Debug)]
pub(super) struct Table {
    pub(super) caption: String,
    pub(super) header: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
    /// Columns of words, from the left; numbers follow.
    pub(super) words: usize,
}

/// What series look like: the same policy looks the same in every picture of a report.
#[derive(Debug, Default)]
pub(super) struct Styles(Vec<String>);

impl Styles {
    /// The style of a name; full context has that of the ink.
    pub(super) fn of(&mut self, name: &str) -> usize {
        if name == "full" {
            return 0;
        }
        let known = self.0.iter().position(|known| known == name);
        1 + known.unwrap_or_else(|| {
            self.0.push(name.to_owned());
            self.0.len() - 1
        })
    }
}

/// Strings from anything that prints.
pub(super) fn strings<T: ToString>(items: impl IntoIterator<Item = T>) -> Vec<String> {
    items.into_iter().map(|item| item.to_string()).collect()
}

/// A cell without a number.
pub(super) const NONE: &str = "–";

/// A number's cell.
pub(super) fn or_none(text: Option<String>) -> String {
    text.unwrap_or_else(|| NONE.to_owned())
}
