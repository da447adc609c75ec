//! What nodes say to pods of one shape, remembered. Pods of equal requests get equal answers from the rules about
//! resources, node by node, until the sums of the node change; so whether a node has room, and how well it suits, is
//! worked out again only where a pod came or went. What is worked out is the plugins' (`fit`, `balanced_allocation`).

use crate::plugins::{BalancedArgs, FitArgs};
use crate::requests::Requests;
use std::cell::Cell;

/// Shapes remembered; of more, the one unused for longest is forgotten.
const SHAPES_MAX: usize = 16;

pub type ShapeId = usize;

/// What answers depend on besides the node.
#[derive(Debug, Clone, PartialEq)]
pub struct ShapeKey {
    pub requests: Requests,
    pub scored_cpu: i64,
    pub scored_memory: i64,
    pub fit: FitArgs,
    pub balanced: BalancedArgs,
}

/// What one node says.
#[derive(Debug, Clone, Copy, Default)]
pub struct Answer {
    /// The version of the node's sums this is about, as [`current`] knows it; 0 for none.
    pub version: u32,
    /// What is missing, as `fit` encodes it; 0 if there is room.
    pub refusal: u32,
    /// Scores, 0 to 100; none where there is no room.
    pub fit: i16,
    pub balanced: i16,
}

#[derive(Debug, Default)]
pub struct Shapes {
    shapes: Vec<Shape>,
    /// Counts questions, to know who was asked last.
    asked: u64,
}

#[derive(Debug)]
struct Shape {
    key: ShapeKey,
    answers: Vec<Cell<Answer>>,
    asked: u64,
}

impl Shapes {
    /// The shape of that key, with room for so many slots. Good until the next call.
    pub fn get(
        &mut self,
        same: impl Fn(&ShapeKey) -> bool,
        new: impl FnOnce() -> ShapeKey,
        slots: usize,
    ) -> ShapeId {
        self.asked += 1;
        let id = match self.shapes.iter().position(|shape| same(&shape.key)) {
            Some(id) => id,
            None => self.begin(new()),
        };
        let shape = &mut self.shapes[id];
        shape.asked = self.asked;
        shape.answers.resize(slots, Cell::default());
        id
    }

    fn begin(&mut self, key: ShapeKey) -> ShapeId {
        if self.shapes.len() < SHAPES_MAX {
            self.shapes.push(Shape { key, answers: Vec::new(), asked: 0 });
            return self.shapes.len() - 1;
        }
        let by_age = self.shapes.iter().enumerate().min_by_key(|(_, shape)| shape.asked);
        let (id, _) = by_age.expect("the list is full");
        let shape = &mut self.shapes[id];
        shape.key = key;
        shape.answers.fill(Cell::default());
        id
    }

    /// What nodes said, by slot; [`current`] says which of it still holds.
    pub fn answers(&self, id: ShapeId) -> &[Cell<Answer>] {
        &self.shapes[id].answers
    }
}

/// The answer of a node whose sums have this version: the one it gave, or a new one.
#[inline]
pub fn current(given: &Cell<Answer>, version: u32, work_out: impl FnOnce() -> Answer) -> Answer {
    let known = given.get();
    if known.version == version {
        return known;
    }
    let answer = Answer { version, ..work_out() };
    given.set(answer);
    answer
}
