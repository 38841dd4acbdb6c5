//! Optimisers in `f32`.

use ndarray::{Array, Dimension, Zip};

use crate::job::{AdamSpec, Optimiser, TrainSpec};

/// One step of a parameter. `kept` is the optimiser's: the velocity; or Adam's moments and the largest
/// second one.
pub(super) fn apply<D: Dimension>(
    w: &mut Array<f32, D>,
    kept: [&mut Array<f32, D>; 3],
    g: &Array<f32, D>,
    spec: &TrainSpec,
    rate: f64,
) {
    let [first, second, most] = kept;
    match spec.optimiser {
        Optimiser::Sgd => descend(w, first, g, spec, rate as f32),
        Optimiser::Adam(adam) => {
            moments(first, second, g, adam);
            Zip::from(&mut *most)
                .and(&*second)
                .for_each(|most, v| *most = if adam.amsgrad { most.max(*v) } else { *v });
            let (rate, decay) = (rate as f32, spec.weight_decay as f32);
            let floor = (adam.epsilon * adam.epsilon) as f32;
            Zip::from(w)
                .and(&*first)
                .and(&*most)
                .for_each(|w, m, v| *w -= rate * (m / (v + floor).sqrt() + decay * *w));
        }
    }
}

/// `v = mu v + g + l w`, `w = w - rate v`; with Nesterov `w = w - rate (g + l w + mu v)`.
fn descend<D: Dimension>(
    w: &mut Array<f32, D>,
    v: &mut Array<f32, D>,
    g: &Array<f32, D>,
    spec: &TrainSpec,
    rate: f32,
) {
    let (mu, decay) = (spec.momentum as f32, spec.weight_decay as f32);
    Zip::from(w).and(v).and(g).for_each(|w, v, g| {
        let g = g + decay * *w;
        *v = mu * *v + g;
        *w -= rate * if spec.nesterov { g + mu * *v } else { *v };
    });
}

/// `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`, with the betas as the Programs use them.
fn moments<D: Dimension>(
    m: &mut Array<f32, D>,
    v: &mut Array<f32, D>,
    g: &Array<f32, D>,
    adam: AdamSpec,
) {
    let (one, two) = adam.betas();
    let (one, two) = (one as f32, two as f32);
    Zip::from(m).and(v).and(g).for_each(|m, v, g| {
        *m = one * *m + (1.0 - one) * g;
        *v = two * *v + (1.0 - two) * g * g;
    });
}
