//! Forward: one image is one task. Backward: one row of the parameters is one task that walks over the images in order;
//! finding the tokens that used the row costs a look at `order`, nothing beside reading their gradients.

use super::{Backward, Forward, PatchDims, PositionKind, QueryKind};
use crate::cpu::{rows, vectorize};
use crate::{Cpu, Element, Result, Wide};
use num_traits::Zero;
use rayon::prelude::*;

/// Features of a task that sums the gradient of u0.
const FEATURES: usize = 64;

impl PatchDims {
    /// Writes the position embedding of patch `place`.
    #[inline(always)]
    pub(crate) fn position<W: Wide>(&self, positions: &[W], place: usize, out: &mut [W]) {
        let row = |row: usize| &positions[row * self.d..][..self.d];
        match self.positions {
            PositionKind::Table => out.copy_from_slice(row(place)),
            PositionKind::RowCol => {
                let (rows, columns) = (row(place / self.grid), row(self.grid + place % self.grid));
                for j in 0..self.d {
                    out[j] = rows[j] + columns[j];
                }
            }
        }
    }

    /// Whether the embedding of patch `place` is made of row `row` of the parameters.
    #[inline(always)]
    pub(crate) fn position_uses(&self, place: usize, row: usize) -> bool {
        match self.positions {
            PositionKind::Table => place == row,
            PositionKind::RowCol if row < self.grid => place / self.grid == row,
            PositionKind::RowCol => place % self.grid == row - self.grid,
        }
    }
}

pub(crate) fn tokens_forward<T: Element>(cpu: &Cpu, args: Forward<'_, Cpu, T>) -> Result<()> {
    let Forward { dims, h, order, u0, positions, x } = args;
    let (n, d) = (dims.n(), dims.d);
    cpu.install(|| {
        let images = x.par_chunks_mut(dims.t() * d).enumerate();
        images.for_each_init(
            || vec![T::Wide::zero(); d],
            |position, (image, x)| {
                vectorize(
                    #[inline(always)]
                    || {
                        let (hidden, seen) = order[image * n..][..n].split_at(dims.hidden);
                        let (queries, visible) = x.split_at_mut(dims.q() * d);
                        match (dims.queries, positions) {
                            (QueryKind::Places, Some(positions)) => {
                                for (x, &place) in queries.chunks_exact_mut(d).zip(hidden) {
                                    dims.position(positions, place as usize, position);
                                    rows::add(position, u0);
                                    rows::narrow(position, x);
                                }
                            }
                            _ => rows::narrow(u0, queries),
                        }
                        for (x, &place) in visible.chunks_exact_mut(d).zip(seen) {
                            let h = &h[(image * n + place as usize) * d..][..d];
                            let Some(positions) = positions else {
                                x.copy_from_slice(h);
                                continue;
                            };
                            dims.position(positions, place as usize, position);
                            for j in 0..d {
                                x[j] = T::narrow(h[j].widen() + position[j]);
                            }
                        }
                    },
                );
            },
        );
    });
    Ok(())
}

pub(crate) fn tokens_backward<T: Element>(cpu: &Cpu, args: Backward<'_, Cpu, T>) -> Result<()> {
    let Backward { dims, order, dx, dh, du0, dpositions_acc } = args;
    let (n, d, dx_image) = (dims.n(), dims.d, dims.t() * dims.d);
    // Tokens that carry a place, with it: the visible patches, and before them the queries of places.
    let skipped = match dims.queries {
        QueryKind::Summary => dims.hidden,
        QueryKind::Places => 0,
    };
    let placed = |image: usize| {
        let places = order[image * n..][skipped..n].iter().map(|&place| place as usize);
        (dims.t() - places.len()..).zip(places)
    };
    let token = |image: usize, token: usize| &dx[image * dx_image + token * d..][..d];
    cpu.install(|| {
        dh.par_chunks_mut(n * d).enumerate().for_each(|(image, dh)| {
            for (slot, place) in placed(image).filter(|&(token, _)| token >= dims.q()) {
                dh[place * d..][..d].copy_from_slice(token(image, slot));
            }
        });
        du0.par_chunks_mut(FEATURES).enumerate().for_each(|(task, du0)| {
            vectorize(
                #[inline(always)]
                || {
                    du0.fill(T::Wide::zero());
                    for image in dx.chunks_exact(dx_image) {
                        for query in image.chunks_exact(d).take(dims.q()) {
                            rows::add(du0, &query[task * FEATURES..]);
                        }
                    }
                },
            );
        });
        let Some(dpositions) = dpositions_acc else { return };
        dpositions.par_chunks_mut(d).enumerate().for_each_init(
            || vec![T::Wide::zero(); d],
            |sum, (row, dposition)| {
                vectorize(
                    #[inline(always)]
                    || {
                        sum.fill(T::Wide::zero());
                        for image in 0..dims.b {
                            for (slot, _) in placed(image).filter(|&(_, place)| dims.position_uses(place, row)) {
                                rows::add(sum, token(image, slot));
                            }
                        }
                        rows::add(dposition, sum);
                    },
                );
            },
        );
    });
    Ok(())
}
