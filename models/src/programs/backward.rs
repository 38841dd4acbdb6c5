//! The backward pass: from the gradient of the logits to that of every weight and bias.
//!
//! Gradients of activations are summed over nothing and not divided by the batch: that division is
//! part of the update. They are truncated to f fraction bits where a product reads them, together with
//! the ReLU or the pool that they pass. The gradient of the images is never built.

use trefoil_protocol::program::{BuildError, Builder, Rounding, Val};

use super::forward::{Recorded, What, aligned, conv_spec, pool_spec};
use super::{Format, activation, at_most, exactly, learnt_poly, norm};
use crate::network::{LayerKind, Network};

/// The gradient of one parameter, summed over the batch.
#[derive(Debug)]
pub(crate) struct Gradient {
    /// Index of the layer.
    pub layer: usize,
    /// Carried name of the parameter.
    pub name: String,
    /// The parameter.
    pub value: Val,
    /// Its gradient; about 2f fraction bits for weights, f for biases.
    pub sum: Val,
}

/// Walks the tape backward from `g`, the gradient of the logits. A layer that several read gets the sum
/// of their gradients.
pub(crate) fn backward(
    b: &mut Builder,
    network: &Network,
    format: Format,
    rounding: Rounding,
    tape: &[Recorded],
    g: Val,
) -> Result<Vec<Gradient>, BuildError> {
    let f = format.frac_bits;
    let trained = network.trained();
    let mut gradients = Vec::new();
    let mut arrived: Vec<Option<Val>> = vec![None; tape.len()];
    arrived[tape.len() - 1] = Some(g);
    for at in (0..tape.len()).rev() {
        // Nothing arrives where no weights are, nor at a pool that its ReLU has passed on.
        let Some(g) = arrived[at].take() else {
            continue;
        };
        let entry = &tape[at];
        let layer = &network.layers[at];
        b.scope(&layer.name);
        let rows = b.shape(g)[0];
        let out_shape = [&[rows], &layer.output[..]].concat();
        let g = b.reshape(g, &out_shape)?;
        // The sources, with what arrives at each.
        let mut passed: Vec<(Option<usize>, Val)> = Vec::new();
        let first = layer.sources[0];
        let wanted = first.is_some_and(|source| trained[source]);
        match &entry.what {
            What::Linear { x, w, bias } => {
                let g = at_most(b, g, f, rounding)?;
                let trailing = out_shape.len() - 2;
                let db = b.sum(g, 1, trailing)?;
                gradients.push(Gradient {
                    layer: at,
                    name: layer.bias_name(),
                    value: *bias,
                    sum: db,
                });
                let w_shape = b.shape(*w);
                let dw = if let LayerKind::Conv { .. } = layer.kind {
                    b.conv2d_grad_weight(*x, g, &w_shape, conv_spec(&layer.kind))?
                } else {
                    let x = b.reshape(*x, &[rows, layer.fan_in()])?;
                    b.matmul(x, g, true, false)?
                };
                gradients.push(Gradient {
                    layer: at,
                    name: layer.weight_name(),
                    value: *w,
                    sum: dw,
                });
                if wanted {
                    let dx = if let LayerKind::Conv { .. } = layer.kind {
                        b.conv2d_grad_input(g, *w, &entry.x_shape, conv_spec(&layer.kind))?
                    } else {
                        b.matmul(g, *w, false, true)?
                    };
                    passed.push((first, dx));
                }
            }
            What::Relu { bit } => {
                let pool = first.filter(|pool| wanted && network.readers(*pool) == 1);
                let pool = pool.map(|pool| (pool, &tape[pool]));
                if let Some((
                    pool,
                    Recorded {
                        x_shape,
                        what: What::MaxPool { bits },
                    },
                )) = pool
                {
                    let relu = Some(*bit);
                    let dx = pool_grad(b, network, pool, *bits, relu, g, x_shape, f, rounding)?;
                    passed.push((network.layers[pool].sources[0], dx));
                } else {
                    let dx = match b.ty(g).frac_bits.checked_sub(f) {
                        None | Some(0) => b.bit_mul(*bit, g)?[0],
                        Some(shift) => b.bit_trunc(*bit, g, shift, rounding)?[0],
                    };
                    passed.push((first, dx));
                }
            }
            What::MaxPool { bits } => {
                let x_shape = &entry.x_shape;
                let dx = pool_grad(b, network, at, *bits, None, g, x_shape, f, rounding)?;
                passed.push((first, dx));
            }
            What::AvgPool(averages) => {
                let dx = averages.gradient(b, g, &entry.x_shape, f, rounding)?;
                passed.push((first, dx));
            }
            What::Derivative { value, log2_factor } => {
                let at_f = at_most(b, g, f, rounding)?;
                let product = b.mul(*value, at_f)?;
                let frac = b.ty(product).frac_bits - log2_factor;
                passed.push((first, b.rescale(product, frac)?));
            }
            What::Gates(gates) => {
                passed.push((first, activation::gradient(b, gates, g, f, rounding)?));
            }
            What::LearntPoly(kept) => {
                let gradient = learnt_poly::gradient(b, kept, g, wanted, f, rounding)?;
                gradients.push(Gradient {
                    layer: at,
                    name: layer.bias_name(),
                    value: kept.bias,
                    sum: gradient.bias,
                });
                gradients.push(Gradient {
                    layer: at,
                    name: layer.weight_name(),
                    value: kept.weight,
                    sum: gradient.weight,
                });
                passed.extend(gradient.x.map(|dx| (first, dx)));
            }
            What::BatchNorm(kept) => {
                let gradient = norm::gradient(b, kept, g, wanted, format, rounding)?;
                gradients.push(Gradient {
                    layer: at,
                    name: layer.bias_name(),
                    value: kept.beta,
                    sum: gradient.beta,
                });
                gradients.push(Gradient {
                    layer: at,
                    name: layer.weight_name(),
                    value: kept.gamma,
                    sum: gradient.gamma,
                });
                passed.extend(gradient.x.map(|dx| (first, dx)));
            }
            What::Dropout(kept) => passed.push((first, kept.apply(b, g, f, rounding)?)),
            What::Reshape => passed.push((first, g)),
            What::Join => {
                let mut start = 0;
                for source in &layer.sources {
                    let part = if layer.kind == LayerKind::Concat {
                        let take = source.map_or(network.input[0], |s| network.layers[s].output[0]);
                        let part = b.slice(g, 1, start, take)?;
                        start += take;
                        part
                    } else {
                        g
                    };
                    passed.push((*source, part));
                }
            }
        }
        for (source, dx) in passed {
            let Some(source) = source.filter(|source| trained[*source]) else {
                continue;
            };
            let shape = [&[rows], &network.layers[source].output[..]].concat();
            let dx = b.reshape(dx, &shape)?;
            arrived[source] = Some(match arrived[source] {
                None => dx,
                Some(sum) => {
                    let [sum, dx] = aligned(b, &[sum, dx], rounding)?[..] else {
                        return Err(b.error("add", "two gradients became others"));
                    };
                    b.add(sum, dx)?
                }
            });
        }
    }
    Ok(gradients)
}

#[allow(clippy::too_many_arguments)] // one call site for each of two cases; a struct would only rename them
fn pool_grad(
    b: &mut Builder,
    network: &Network,
    layer: usize,
    bits: Val,
    relu: Option<Val>,
    g: Val,
    x_shape: &[usize],
    f: u8,
    rounding: Rounding,
) -> Result<Val, BuildError> {
    let layer = &network.layers[layer];
    let LayerKind::MaxPool(window) = layer.kind else {
        return Err(b.error("max_pool", "the tape does not fit the network"));
    };
    b.scope(&layer.name);
    let spec = pool_spec(window);
    let selectors = b.pool_select(bits, relu, x_shape, spec)?;
    // The operation truncates: a gradient that has f fraction bits already gets one more first.
    let target = b.ty(g).frac_bits.min(f);
    let g = if b.ty(g).frac_bits == target {
        exactly(b, g, target + 1, rounding)?
    } else {
        g
    };
    let shift = b.ty(g).frac_bits - target;
    b.max_pool_grad(selectors, g, shift, rounding, x_shape, spec)
}
