//! Partial sums of a map's channels, on their way from the operation that makes them to [`crate::bn_finalize`].

use crate::error::{Result, require};
use crate::{Memory, Scalar, View, ViewMut};

/// The least rows that share one partial sum.
pub(crate) const SUM_ROWS: usize = 128;

/// Sums over tiles of the rows of a map, two numbers a channel and tile: mean and sum of squared deviations of the
/// forward pass, or sums of `dz` and of `dz * xhat` of the backward pass.
///
/// How rows are cut into tiles is the device's own function of the producer's shape, so what lies here means something
/// only to the [`crate::bn_finalize`] of the same device, which merges the tiles in `f64` in a fixed order.
#[derive(Debug)]
pub struct Partials<M: Memory, W: Scalar> {
    room: M::Buffer<W>,
    made: Option<(Cut, usize)>,
}

/// Elements of the room that sums of a map of `rows` pixels and `c` channels may take on any device.
pub const fn partials_room(rows: usize, c: usize) -> usize {
    (rows.div_ceil(SUM_ROWS) + 3) * 2 * c
}

/// The rows of a map, cut into tiles: runs of rows one after the other, each cut into tiles of `tile` rows (the last
/// one of a run may be shorter).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Rows of each run; most have one. A strided convolution's data gradient has one for each class of pixels.
    pub(crate) runs: [usize; 4],
    /// Rows of a tile.
    pub(crate) tile: usize,
}

impl Cut {
    /// One run, in tiles of [`SUM_ROWS`] rows.
    pub(crate) const fn plain(rows: usize) -> Self {
        Self { runs: [rows, 0, 0, 0], tile: SUM_ROWS }
    }

    /// Rows in all.
    pub(crate) fn rows(&self) -> usize {
        self.runs.iter().sum()
    }

    /// Tiles in all.
    pub(crate) fn tiles(&self) -> usize {
        self.runs.iter().map(|rows| rows.div_ceil(self.tile)).sum()
    }

    /// Rows of each tile, in order.
    pub(crate) fn lens(self) -> impl Iterator<Item = usize> {
        self.runs.into_iter().flat_map(move |rows| (0..rows).step_by(self.tile).map(move |at| self.tile.min(rows - at)))
    }
}

impl<M: Memory, W: Scalar> Partials<M, W> {
    /// In a buffer with [`partials_room`] for the largest map.
    pub fn within(room: M::Buffer<W>) -> Self {
        Self { room, made: None }
    }

    /// Whether a map of `rows` pixels and `c` channels has room.
    pub(crate) fn check(&self, op: &'static str, rows: usize, c: usize) -> Result<()> {
        let (room, needed) = (M::len(&self.room), partials_room(rows, c));
        require(op, room >= needed, || {
            format!("partial sums of {rows} rows of {c} channels take {needed} elements, room for {room}")
        })
    }

    /// Where a producer, having checked that there is room, puts `[cut.tiles(), 2, c]`.
    pub(crate) fn make(&mut self, cut: Cut, c: usize) -> ViewMut<'_, M, W> {
        self.made = Some((cut, c));
        M::view_mut(&mut self.room, 0..cut.tiles() * 2 * c)
    }

    /// Whether these are the sums of a map of `rows` pixels and `c` channels.
    pub(crate) fn check_made(&self, op: &'static str, rows: usize, c: usize) -> Result<()> {
        let made = self.made.map(|(cut, c)| (cut.rows(), c));
        require(op, made == Some((rows, c)), || match made {
            Some((made, channels)) => {
                format!("partial sums of {made} rows of {channels} channels, for a map of {rows} rows of {c} channels")
            }
            None => "the partial sums were never made".into(),
        })
    }

    /// What was made last: the cut and `[cut.tiles(), 2, c]`.
    ///
    /// # Panics
    /// When nothing was: [`Partials::check_made`] comes first.
    pub(crate) fn made(&self) -> (Cut, View<'_, M, W>) {
        let (cut, c) = self.made.expect("checked before");
        (cut, M::view(&self.room, 0..cut.tiles() * 2 * c))
    }

    /// All of the room, for tests of what was written beside the sums.
    #[cfg(test)]
    pub(crate) fn buffer(&self) -> &M::Buffer<W> {
        &self.room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_one_after_the_other() {
        let cut = Cut { runs: [130, 128, 1, 0], tile: 128 };
        assert_eq!((cut.rows(), cut.tiles()), (259, 4));
        assert_eq!(cut.lens().collect::<Vec<_>>(), [128, 2, 128, 1]);
        assert_eq!(Cut::plain(256).lens().collect::<Vec<_>>(), [128, 128]);
        assert!(cut.tiles() * 2 <= partials_room(259, 1));
    }
}
