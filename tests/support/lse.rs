//! Where the LSE of queries lies, in the shapes that kernels of attention leave it in.

use std::f64::consts::LN_2;

use fastkv::kernels::batch::{Logarithm, Lse};

use super::{memory::Spread, random::Random};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// `[heads, tokens]`.
    HeadMajor,
    /// `[tokens, heads]`.
    TokenMajor,
    /// `[sequences, heads, room]`.
    Padded,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct LseLayout {
    pub(crate) order: Order,
    /// Elements behind the innermost rows, and behind a sequence where it has a stride, that are no query's.
    pub(crate) gap: usize,
    pub(crate) logarithm: Logarithm,
}

/// Whose LSE it is.
pub(crate) struct Queries {
    pub(crate) heads: usize,
    /// Tokens of no sequence before the first.
    pub(crate) skipped: usize,
    /// Of each sequence.
    pub(crate) counts: Vec<usize>,
    /// Queries that a sequence has room for.
    pub(crate) room: usize,
}

impl Queries {
    /// Along the token axis.
    fn tokens(&self) -> usize {
        self.skipped + self.counts.iter().sum::<usize>()
    }
}

impl LseLayout {
    /// As this crate's attention leaves it where nobody asks for anything else.
    pub(crate) const PLAIN: Self = Self { order: Order::HeadMajor, gap: 0, logarithm: Logarithm::Natural };

    pub(crate) fn random(random: &mut Random) -> Self {
        Self {
            order: random.of(&[Order::HeadMajor, Order::TokenMajor, Order::Padded]),
            gap: random.below(4),
            logarithm: random.of(&[Logarithm::Natural, Logarithm::Binary]),
        }
    }

    /// Every order with either logarithm.
    pub(crate) fn each() -> impl Iterator<Item = Self> {
        [Order::HeadMajor, Order::TokenMajor, Order::Padded].into_iter().flat_map(|order| {
            [Logarithm::Natural, Logarithm::Binary].map(|logarithm| Self { order, gap: 3, logarithm })
        })
    }

    pub(crate) fn describe(self, base: u64, queries: &Queries) -> Lse {
        let Self { order, gap, logarithm } = self;
        let row = |width: usize| (width + gap) as i64;
        let [sequence_stride, head_stride, token_stride] = match order {
            Order::HeadMajor => [0, row(queries.tokens()), 1],
            Order::TokenMajor => [0, 1, row(queries.heads)],
            Order::Padded => [row(queries.heads * (queries.room + gap)), row(queries.room), 1],
        };
        Lse { base, sequence_stride, head_stride, token_stride, logarithm }
    }

    /// The same where steps along the outermost axis lie apart.
    pub(crate) fn describe_spread(self, base: u64, queries: &Queries, spread: Spread) -> Lse {
        let mut lse = self.describe(base, queries);
        if let Some(stride) = spread.stride(4) {
            *self.outermost_of(&mut lse) = stride;
        }
        lse
    }

    /// Elements of a step along the outermost axis.
    pub(crate) fn outermost(self, queries: &Queries) -> usize {
        *self.outermost_of(&mut self.describe(0, queries)) as usize
    }

    fn outermost_of(self, lse: &mut Lse) -> &mut i64 {
        match self.order {
            Order::HeadMajor => &mut lse.head_stride,
            Order::TokenMajor => &mut lse.token_stride,
            Order::Padded => &mut lse.sequence_stride,
        }
    }

    /// The element of every query of every head of every sequence, in this order.
    pub(crate) fn places(self, queries: &Queries) -> Vec<usize> {
        let Queries { heads, skipped, counts, room } = queries;
        let tokens = queries.tokens();
        let mut places = Vec::new();
        let mut before = *skipped;
        for (sequence, count) in counts.iter().enumerate() {
            for head in 0..*heads {
                places.extend((0..*count).map(|query| match self.order {
                    Order::HeadMajor => head * (tokens + self.gap) + before + query,
                    Order::TokenMajor => (before + query) * (heads + self.gap) + head,
                    Order::Padded => {
                        (sequence * heads + head) * (room + self.gap) + sequence * self.gap + query
                    }
                }));
            }
            before += count;
        }
        places
    }

    /// Elements that are described, from the first to the last.
    pub(crate) fn elements(self, queries: &Queries) -> usize {
        let counts = match self.order {
            Order::Padded => vec![queries.room; queries.counts.len()],
            _ => queries.counts.clone(),
        };
        self.places(&Queries { counts, ..*queries }).into_iter().max().map_or(0, |last| last + 1)
    }

    /// What stands there for a natural logarithm.
    pub(crate) fn value(self, natural: f64) -> f64 {
        match self.logarithm {
            Logarithm::Natural => natural,
            Logarithm::Binary => natural / LN_2,
        }
    }
}
