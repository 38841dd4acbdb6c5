//! The gradient of a loss by the logits, for each row; its mean over the batch is part of the update.

use trefoil_protocol::program::{BuildError, Builder, Curve, Val};

use super::Ratio;
use super::forward::divide;
use crate::job::{Loss, TrainSpec};
use crate::recipe::CLASS_WEIGHT_FRAC;

/// The layers' names of the losses: nothing of the forward pass comes after them.
pub(crate) const LOSS_SCOPES: [&str; 4] = ["softmax", "sigmoid", "squares", "class_weights"];

/// `2^s w_label dL/dlogits` for `logits [rows, classes]` (2f fraction bits) and one-hot `labels` (no
/// fraction bits), with the spec's class weights w and gradient scale s.
///
/// 1. Softmax cross-entropy: `softmax(z) - y`. Binary: `(sigmoid(z) - y) / classes`. Squares:
///    `2 (z - y) / classes`.
/// 2. With class weights: times `w_label`, a linear function of the labels, in one product.
/// 3. Times `2^s`: no work.
pub(crate) fn gradient(
    b: &mut Builder,
    spec: &TrainSpec,
    logits: Val,
    labels: Val,
) -> Result<Val, BuildError> {
    let [rows, classes] = b.shape(logits)[..] else {
        return Err(b.error("loss", "needs logits [rows, classes]"));
    };
    let mut g = match spec.loss {
        Loss::SoftmaxCrossEntropy => {
            b.scope("softmax");
            let p = b.softmax(logits)?;
            minus(b, p, labels)?
        }
        Loss::BinaryCrossEntropy => {
            b.scope("sigmoid");
            let (p, _) = b.piecewise(logits, Curve::Sigmoid)?;
            let error = minus(b, p, labels)?;
            per_class(b, spec, error, 1.0 / classes as f64)?
        }
        Loss::MeanSquaredError => {
            b.scope("squares");
            let error = minus(b, logits, labels)?;
            per_class(b, spec, error, 2.0 / classes as f64)?
        }
    };
    if !spec.class_weights.is_empty() {
        b.scope("class_weights");
        let mut of_row: Option<Val> = None;
        for (class, weight) in spec.class_weights.iter().enumerate() {
            let is_class = b.slice(labels, 1, class, 1)?;
            let part = b.scale_real(is_class, *weight, CLASS_WEIGHT_FRAC)?;
            of_row = Some(match of_row {
                None => part,
                Some(sum) => b.add(sum, part)?,
            });
        }
        let of_row = of_row.ok_or_else(|| b.error("class_weights", "there are none"))?;
        let of_row = b.reshape(of_row, &[rows])?;
        let of_row = b.broadcast(of_row, &[], &[classes])?;
        // The product needs room: logits have up to 2f fraction bits.
        let at_f = super::at_most(b, g, spec.frac_bits, spec.rounding)?;
        g = b.mul(at_f, of_row)?;
    }
    if spec.gradient_scale_log2 > 0 {
        g = b.scale(g, 1 << spec.gradient_scale_log2)?;
    }
    Ok(g)
}

/// `p - y` at the scale of p.
fn minus(b: &mut Builder, p: Val, labels: Val) -> Result<Val, BuildError> {
    let frac = b.ty(p).frac_bits;
    let y = b.scale(labels, 1 << frac)?;
    let y = b.rescale(y, frac)?;
    b.sub(p, y)
}

fn per_class(b: &mut Builder, spec: &TrainSpec, g: Val, factor: f64) -> Result<Val, BuildError> {
    divide(b, g, Ratio::nearest(factor), spec.frac_bits, spec.rounding)
}
