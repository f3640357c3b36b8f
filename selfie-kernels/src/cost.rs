//! What a pass costs at least, whatever computes it: the measure of how well a device does it.

use std::fmt::Display;

/// The least that a call of a pass must compute and move, by its formula and not by how a device does it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cost {
    /// Its sizes in words, as `3x3 64->64 at 8x8`.
    pub shape: String,
    /// Floating-point operations of its products, two for a multiplication with its addition, none for taps into the
    /// padding. What is done element by element is not counted: it hides behind the bytes.
    pub flops: u64,
    /// Every operand read once, and every result written once, in bytes. Partial sums count as what they are merged to:
    /// how many there are is the device's.
    pub bytes: u64,
}

impl Cost {
    /// Of a call that does nothing yet.
    pub(crate) fn of(shape: impl Display) -> Self {
        Self { shape: shape.to_string(), flops: 0, bytes: 0 }
    }

    /// With so many multiplications and additions.
    #[must_use]
    pub(crate) fn products(mut self, pairs: usize) -> Self {
        self.flops += 2 * pairs as u64;
        self
    }

    /// With so many elements of type `S`, read or written.
    #[must_use]
    pub(crate) fn moves<S>(mut self, elements: usize) -> Self {
        self.bytes += (elements * size_of::<S>()) as u64;
        self
    }
}

#[cfg(test)]
mod tests {
    use crate::norm_relu_conv::{Backward, BackwardData, Forward, ProjectionBackwardData};
    use crate::{Affine, ConvDims, Cpu, Grad, Partials, gemm, sgd, stem_conv, stem_pool};
    use half::bf16;

    /// 3x3 on 2 x 2 pixels: each reads 4 of its 9 taps.
    const SMALL: ConvDims = ConvDims { n: 5, h: 2, w: 2, c: 3, k: 7, r: 3, s: 3, stride: 1, pad: 1 };

    #[test]
    fn taps_into_the_padding_cost_nothing() {
        assert_eq!(SMALL.pairs(), 5 * (4 * 4) * 3 * 7);
        // On 3 x 3 pixels with stride 2, the corners of the padded image: each output pixel reads 4 taps.
        assert_eq!(ConvDims { h: 3, w: 3, stride: 2, ..SMALL }.pairs(), 5 * (4 * 4) * 3 * 7);
        // Without padding all taps count: 2 x 1 outputs of 3 x 3 taps.
        assert_eq!(ConvDims { h: 4, w: 3, pad: 0, ..SMALL }.pairs(), 5 * (2 * 9) * 3 * 7);
    }

    #[test]
    fn a_convolution_moves_its_operands_once() {
        let mut y = vec![bf16::ZERO; SMALL.len_out()];
        let (x, w) = (vec![bf16::ZERO; SMALL.len_in()], vec![bf16::ZERO; SMALL.len_filter()]);
        let mut stats = Partials::<Cpu, f32>::within(Vec::new());
        let mut args: Forward<'_, Cpu, bf16> =
            Forward { dims: SMALL, x: &x, norm: &[0.0; 12], w: &w, residual: None, y: &mut y, stats: None };
        // 5 * 2 * 2 pixels of 3 and of 7 channels, 7 * 9 * 3 weights; scale, shift and so on of 3 channels.
        let plain = 2 * (60 + 140 + 189) + 4 * 12;
        let cost = args.cost();
        assert_eq!((cost.shape.as_str(), cost.flops, cost.bytes), ("3x3 3->7 at 2x2", 2 * 1680, plain));
        args.stats = Some(&mut stats);
        assert_eq!(args.cost().bytes, plain + 4 * 14);
        let residual = vec![bf16::ZERO; 140];
        args.residual = Some(&residual);
        assert_eq!(args.cost().bytes, plain + 4 * 14 + 2 * 140);
    }

    #[test]
    fn an_affine_gradient_is_two_tensors_and_its_coefficients() {
        let dims = ConvDims { n: 1, h: 4, w: 4, c: 2, k: 3, r: 1, s: 1, stride: 2, pad: 0 };
        let (dz, coef, w, mut dx) = (&[0.0f32; 12][..], &[0.0f32; 9][..], [0.0f32; 6], [0.0f32; 8]);
        let mut args: ProjectionBackwardData<'_, Cpu, f32> =
            ProjectionBackwardData { dims, dy: Grad::Plain(dz), w: &w, dx: &mut dx };
        let cost = args.cost();
        assert_eq!((cost.shape.as_str(), cost.flops, cost.bytes), ("1x1/2 2->3 at 2x2", 2 * 24, 4 * (12 + 6 + 8)));
        args.dy = Grad::Affine(Affine { dz, x: dz, coef });
        assert_eq!(args.cost().bytes, 4 * (12 + 12 + 9 + 6 + 8));
        let (dy, mut dw) = (args.dy, [0.0; 6]);
        let args: stem_conv::BackwardFilter<'_, Cpu, f32> =
            stem_conv::BackwardFilter { dims, x: &[0.0; 32], dy, dw: &mut dw };
        assert_eq!((args.cost().flops, args.cost().bytes), (2 * 24, 4 * (32 + 12 + 12 + 9 + 6)));
    }

    /// 60 inputs, 140 outputs, and 189 weights: both products, and what both read once.
    #[test]
    fn both_gradients_of_a_convolution_read_their_operands_once() {
        let (x, y, w) = ([0.0f32; 60], &[0.0f32; 140][..], [0.0f32; 189]);
        let (mut dz, mut dw, mut sums) = ([0.0; 60], [0.0; 189], Partials::<Cpu, f32>::within(Vec::new()));
        let dy = Grad::Affine(Affine { dz: y, x: y, coef: &[0.0f32; 21][..] });
        let data: BackwardData<'_, Cpu, f32> = BackwardData {
            dims: SMALL,
            dy,
            w: &w,
            x: &x,
            norm: &[0.0; 12],
            addend: None,
            dz: &mut dz,
            sums: &mut sums,
        };
        let cost = Backward { data, dw: &mut dw }.cost();
        let bytes = 4 * (60 + 2 * 140 + 21 + 189 + 12 + 60 + 6 + 189);
        assert_eq!((cost.flops, cost.bytes), (2 * 2 * 1680, bytes));
    }

    /// Of 3 x 3 pixels a map of 3 x 3, pooled to 2 x 2.
    #[test]
    fn what_is_pooled_is_not_moved() {
        let dims = ConvDims { n: 1, h: 3, w: 3, c: 3, k: 2, r: 1, s: 1, stride: 1, pad: 0 };
        let (x, w, mut map) = ([bf16::ZERO; 27], [bf16::ZERO; 6], [bf16::ZERO; 18]);
        let (mut y, mut argmax, mut dw) = ([bf16::ZERO; 8], [0; 8], [0.0; 6]);
        let args: stem_pool::Forward<'_, Cpu, bf16> =
            stem_pool::Forward { dims, x: &x, w: &w, map: &mut map, y: &mut y, argmax: &mut argmax, stats: None };
        let cost = args.cost();
        let moved = (cost.shape.as_str(), cost.flops, cost.bytes);
        assert_eq!(moved, ("1x1 3->2 at 3x3, pooled", 2 * 54, 2 * (27 + 6 + 8) + 8));
        let (dy, argmax) = (Grad::Plain(&y[..]), &argmax[..]);
        let args: stem_pool::BackwardFilter<'_, Cpu, bf16> =
            stem_pool::BackwardFilter { dims, x: &x, dy, argmax, map: &mut map, dw: &mut dw };
        assert_eq!((args.cost().flops, args.cost().bytes), (2 * 54, 2 * (27 + 8) + 8 + 4 * 6));
    }

    /// Rows that are passed over are not read.
    #[test]
    fn a_strided_product_reads_its_rows() {
        let dims = gemm::GemmDims { m: 4, n: 3, k: 2, x_stride: 10 };
        let (x, dy, mut dw, mut dbias) = ([0.0f32; 32], [0.0f32; 12], [0.0f32; 6], [0.0f32; 3]);
        let args: gemm::BackwardWeight<'_, Cpu, f32> =
            gemm::BackwardWeight { dims, x: &x, dy: &dy, dw: &mut dw, dbias: &mut dbias };
        assert_eq!((args.cost().flops, args.cost().bytes), (2 * 24, 4 * (8 + 12 + 6 + 3)));
    }

    #[test]
    fn an_update_reads_and_writes_what_it_changes() {
        let (mut velocity, mut master, mut copy) = ([0.0f32; 6], [0.0f32; 6], [bf16::ZERO; 6]);
        let args: sgd::Update<'_, Cpu, bf16> = sgd::Update {
            rate: &[0],
            momentum: 0.9,
            weight_decay: 0.0,
            finite: &[1],
            gradient: &[0.0; 6],
            velocity: &mut velocity,
            master: &mut master,
            copy: &mut copy,
        };
        assert_eq!((args.cost().flops, args.cost().bytes), (0, 4 * 5 * 6 + 2 * 6));
    }
}
