//! Images in groups, so that what is kept between two passes over a group, the M x M probabilities of an image, does not
//! grow with the batch. The gradient of the positions is summed by rows of the parameters, images in order.

use super::{Args, Gradients, Units, UnitsBackward};
use crate::cpu::{rows, vectorize};
use crate::softmax_cross_entropy::Tally;
use crate::{Cpu, Element, Result, Wide};
use num_traits::{Float, One, Zero};
use rayon::prelude::*;

/// Images of a group.
const GROUP: usize = 64;

pub(crate) fn contrast<T: Element>(cpu: &Cpu, args: Args<'_, Cpu, T>) -> Result<()> {
    let Args { dims, valid, logit_scale, u_stride, u, h, order, positions, loss, mut gradients } = args;
    let (n, d, hidden) = (dims.n(), dims.d, dims.hidden);
    let scale = T::Wide::from_f64(logit_scale);
    // Of the mean loss with respect to `v . h`, per unit of probability.
    let dlogit = T::Wide::from_f64(logit_scale / (valid * hidden) as f64);
    let places = |image: usize| order[image * n..][..hidden].iter().map(|&place| place as usize);
    let features = |image: usize, place: usize| &h[(image * n + place) * d..][..d];
    let q = dims.q();
    // The l-th place of an image.
    let query = |image: usize, l: usize, place: usize, out: &mut [T::Wide]| {
        dims.position(positions, place, out);
        rows::add(out, &u[image * u_stride + l.min(q - 1) * d..][..d]);
    };
    let vector = || vec![T::Wide::zero(); d];
    let vectors = || (vector(), vec![T::Wide::zero(); hidden * d]);

    let mut tallies = [Tally::default(); GROUP];
    // [image, l, j]: probabilities, less one where l = j.
    let mut errors = vec![T::Wide::zero(); GROUP.min(valid) * hidden * hidden];
    let mut tally = Tally::default();
    cpu.install(|| {
        for group in (0..valid).step_by(GROUP) {
            let images = GROUP.min(valid - group);
            let tallies = &mut tallies[..images];
            let errors = &mut errors[..images * hidden * hidden];

            let tasks = tallies.par_iter_mut().zip(errors.par_chunks_mut(hidden * hidden)).enumerate();
            tasks.for_each_init(vectors, |(query_tile, keys), (image, (tally, errors))| {
                let image = group + image;
                vectorize(
                    #[inline(always)]
                    || {
                        *tally = Tally::default();
                        for (key, place) in keys.chunks_exact_mut(d).zip(places(image)) {
                            rows::widen(features(image, place), key);
                        }
                        for (l, (row, place)) in errors.chunks_exact_mut(hidden).zip(places(image)).enumerate() {
                            query(image, l, place, query_tile);
                            for (logit, key) in row.iter_mut().zip(keys.chunks_exact(d)) {
                                *logit = rows::dot(query_tile, key) * scale;
                            }
                            tally.count(row, l, hidden);
                            row[l] = row[l] - T::Wide::one();
                        }
                    },
                );
            });
            tally = tallies.iter().copied().fold(tally, Tally::add);

            let Some(Gradients { du, dh, dpositions }) = &mut gradients else { continue };
            let errors = &*errors;
            let du = du[group * u_stride..][..images * u_stride].par_chunks_mut(u_stride);
            let dh = dh[group * n * d..][..images * n * d].par_chunks_mut(n * d);
            let tasks = du.zip(dh).zip(errors.par_chunks(hidden * hidden)).enumerate();
            tasks.for_each_init(vectors, |(tile, dkeys), (image, ((du, dh), errors))| {
                let image = group + image;
                vectorize(
                    #[inline(always)]
                    || {
                        dkeys.fill(T::Wide::zero());
                        for (l, (row, place)) in errors.chunks_exact(hidden).zip(places(image)).enumerate() {
                            query(image, l, place, tile);
                            for (dkey, &error) in dkeys.chunks_exact_mut(d).zip(row) {
                                rows::add_scaled(dkey, error * dlogit, tile);
                            }
                        }
                        for (dkey, place) in dkeys.chunks_exact(d).zip(places(image)) {
                            rows::narrow(dkey, &mut dh[place * d..][..d]);
                        }
                        // The rows of a query: its place's, or all of them.
                        let (du, rest) = du.split_at_mut(q * d);
                        rest.fill(T::narrow(T::Wide::zero()));
                        for (du, errors) in du.chunks_exact_mut(d).zip(errors.chunks_exact(hidden * hidden / q)) {
                            tile.fill(T::Wide::zero());
                            for (j, place) in places(image).enumerate() {
                                let error: T::Wide = errors.iter().skip(j).step_by(hidden).copied().sum();
                                rows::add_scaled(tile, error * dlogit, features(image, place));
                            }
                            rows::narrow(tile, du);
                        }
                    },
                );
            });

            dpositions.par_chunks_mut(d).enumerate().for_each(|(row, dposition)| {
                vectorize(
                    #[inline(always)]
                    || {
                        if group == 0 {
                            dposition.fill(T::Wide::zero());
                        }
                        for (image, errors) in errors.chunks_exact(hidden * hidden).enumerate() {
                            let image = group + image;
                            if !places(image).any(|place| dims.position_uses(place, row)) {
                                continue;
                            }
                            for (j, place) in places(image).enumerate() {
                                let rows = errors.chunks_exact(hidden).zip(places(image));
                                let used = rows.filter(|&(_, place)| dims.position_uses(place, row));
                                let error: T::Wide = used.map(|(errors, _)| errors[j]).sum();
                                rows::add_scaled(dposition, error * dlogit, features(image, place));
                            }
                        }
                    },
                );
            });
        }
    });
    loss.copy_from_slice(&tally.mean(valid * hidden));
    Ok(())
}

pub(crate) fn contrast_units<T: Element>(cpu: &Cpu, args: Units<'_, Cpu, T>) -> Result<()> {
    let Units { dims, temperature, u_stride, u, h, order, positions, queries, keys, norms } = args;
    let (n, d, hidden, q) = (dims.n(), dims.d, dims.hidden, dims.q());
    let length = T::Wide::from_f64(1.0 / temperature);
    cpu.install(|| {
        let (queries, keys) = (queries.par_chunks_mut(hidden * d), keys.par_chunks_mut(hidden * d));
        let tasks = queries.zip(keys).zip(norms.par_chunks_mut(2 * hidden)).enumerate();
        tasks.for_each_init(
            || vec![T::Wide::zero(); d],
            |vector, (image, ((queries, keys), norms))| {
                vectorize(
                    #[inline(always)]
                    || {
                        let rows =
                            queries.chunks_exact_mut(d).zip(keys.chunks_exact_mut(d)).zip(norms.chunks_exact_mut(2));
                        for (l, (((query, key), norms), &place)) in rows.zip(&order[image * n..]).enumerate() {
                            dims.position(positions, place as usize, vector);
                            rows::add(vector, &u[image * u_stride + l.min(q - 1) * d..][..d]);
                            norms[0] = unit(vector, length, query);
                            rows::widen(&h[(image * n + place as usize) * d..][..d], vector);
                            norms[1] = unit(vector, T::Wide::one(), key);
                        }
                    },
                );
            },
        );
    });
    Ok(())
}

/// The vector made as long as `length`; gives one over the length it had, or 0 for zeros.
#[inline(always)]
fn unit<T: Element>(vector: &[T::Wide], length: T::Wide, to: &mut [T]) -> T::Wide {
    let squares = rows::dot(vector, vector);
    let inverse = if squares == T::Wide::zero() { squares } else { squares.sqrt().recip() };
    for (to, &x) in to.iter_mut().zip(vector) {
        *to = T::narrow(x * (inverse * length));
    }
    inverse
}

pub(crate) fn contrast_units_backward<T: Element>(cpu: &Cpu, args: UnitsBackward<'_, Cpu, T>) -> Result<()> {
    let UnitsBackward { dims, temperature, u_stride, order, queries, keys, norms, dqueries, dkeys, along, gradients } =
        args;
    let Gradients { du, dh, dpositions } = gradients;
    let (n, d, hidden, q) = (dims.n(), dims.d, dims.hidden, dims.q());
    let (length, squared) = (T::Wide::from_f64(1.0 / temperature), T::Wide::from_f64(temperature * temperature));
    // `dv = scale * dq - along * q`.
    let scale = |row: usize| norms[2 * row] * length;
    let of = |row: usize| row * d..(row + 1) * d;
    cpu.install(|| {
        let tasks =
            du.par_chunks_mut(u_stride).zip(dh.par_chunks_mut(n * d)).zip(along.par_chunks_mut(hidden)).enumerate();
        tasks.for_each_init(
            || [(); 3].map(|()| vec![T::Wide::zero(); d]),
            |[unit, gradient, sum], (image, ((du, dh), along))| {
                vectorize(
                    #[inline(always)]
                    || {
                        let (du, rest) = du.split_at_mut(q * d);
                        rest.fill(T::narrow(T::Wide::zero()));
                        sum.fill(T::Wide::zero());
                        for (l, (along, &place)) in along.iter_mut().zip(&order[image * n..]).enumerate() {
                            let row = image * hidden + l;
                            rows::widen(&queries[of(row)], unit);
                            rows::widen(&dqueries[of(row)], gradient);
                            *along = rows::dot(gradient, unit) * squared * scale(row);
                            rows::add_scaled(sum, scale(row), gradient);
                            rows::add_scaled(sum, -*along, unit);
                            if l + 1 == hidden || q > 1 {
                                rows::narrow(sum, &mut du[l.min(q - 1) * d..][..d]);
                                sum.fill(T::Wide::zero());
                            }
                            let gradient = &dkeys[of(row)];
                            rows::widen(&keys[of(row)], unit);
                            let along = rows::dot(gradient, unit);
                            let dh = &mut dh[place as usize * d..][..d];
                            for ((to, &gradient), &unit) in dh.iter_mut().zip(gradient).zip(&*unit) {
                                *to = T::narrow((-along).mul_add(unit, gradient) * norms[2 * row + 1]);
                            }
                        }
                    },
                );
            },
        );
        let along = &*along;
        dpositions.par_chunks_mut(d).enumerate().for_each(|(parameter, dposition)| {
            vectorize(
                #[inline(always)]
                || {
                    dposition.fill(T::Wide::zero());
                    for row in 0..dims.b * hidden {
                        let place = order[row / hidden * n + row % hidden] as usize;
                        if dims.position_uses(place, parameter) {
                            rows::add_scaled(dposition, scale(row), &dqueries[of(row)]);
                            rows::add_scaled(dposition, -along[row], &queries[of(row)]);
                        }
                    }
                },
            );
        });
    });
    Ok(())
}
