//! How a graph sees the values of a layer: ONNX transposes, reshapes, squeezes; here that moves no
//! value, it is remembered, and the weights of the next dense layer are put in the order of ours.

/// Values of a layer, or of the images, as a graph sees them behind the batch axis.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// Which layer; the images without.
    pub source: Option<usize>,
    /// The layer's own shape: `[channels, height, width]` or `[units]`.
    pub shape: Vec<usize>,
    /// For each axis of the graph which axes of the layer lie in it, outermost first.
    pub axes: Vec<Vec<usize>>,
    /// Zeros that a `Pad` put around an image: top, left, bottom, right.
    pub pads: [usize; 4],
    /// Whether nobody else reads the layer.
    pub sole: bool,
}

impl View {
    /// A layer's values as it gives them.
    pub fn plain(source: Option<usize>, shape: Vec<usize>, sole: bool) -> View {
        View {
            source,
            axes: (0..shape.len()).map(|axis| vec![axis]).collect(),
            shape,
            pads: [0; 4],
            sole,
        }
    }

    /// The lengths that the graph sees.
    pub fn lengths(&self) -> Vec<usize> {
        let length = |axes: &Vec<usize>| axes.iter().map(|axis| self.shape[*axis]).product();
        self.axes.iter().map(length).collect()
    }

    /// Values of one image.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The layer's axes in the order in which the graph has them, axes of length 1 left out: they can
    /// stand anywhere.
    fn order(&self) -> Vec<usize> {
        let long = |axis: &usize| self.shape[*axis] != 1;
        self.axes.iter().flatten().copied().filter(long).collect()
    }

    /// For each axis of the graph the layer's axes in it that are longer than 1.
    pub fn long_axes(&self) -> Vec<Vec<usize>> {
        let long = |axis: &usize| self.shape[*axis] != 1;
        let long = |axes: &Vec<usize>| axes.iter().copied().filter(long).collect();
        self.axes.iter().map(long).collect()
    }

    /// `[channels, height, width]`, if the graph sees an image as the layer gives it.
    pub fn image(&self) -> Result<[usize; 3], String> {
        let lengths = self.lengths();
        let sorted = self.order().is_sorted();
        match (lengths.as_slice(), self.shape.as_slice()) {
            (&[c, h, w], shape) if sorted && shape == [c, h, w] => Ok([c, h, w]),
            (lengths, shape) => Err(format!(
                "needs [batch, channels, height, width]; reads {lengths:?} behind the batch, axes {:?} of {shape:?}",
                self.axes
            )),
        }
    }

    /// The order in which all axes of the layer stand in the graph's flat form.
    pub fn flat_order(&self) -> Vec<usize> {
        let mut order = self.order();
        order.extend((0..self.shape.len()).filter(|axis| self.shape[*axis] == 1));
        order
    }

    /// The axes in another order; `order` counts without the batch.
    pub fn transpose(mut self, order: &[usize]) -> Result<View, String> {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if sorted != (0..self.axes.len()).collect::<Vec<_>>() {
            return Err(format!("{order:?} is no order of {} axes", self.axes.len()));
        }
        self.axes = order.iter().map(|at| self.axes[*at].clone()).collect();
        Ok(self)
    }

    /// Other lengths for the same values in the same order; an axis of the layer is not cut.
    pub fn reshape(mut self, lengths: &[usize]) -> Result<View, String> {
        let refused = || {
            format!(
                "values of {:?} (axes {:?} of {:?}) cannot be seen as {lengths:?}",
                self.lengths(),
                self.axes,
                self.shape
            )
        };
        let mut order = self.order().into_iter();
        let mut axes = Vec::new();
        for length in lengths {
            let (mut product, mut inside) = (1usize, Vec::new());
            while product < *length {
                let axis = order.next().ok_or_else(refused)?;
                product = product.saturating_mul(self.shape[axis]);
                inside.push(axis);
            }
            if product != *length {
                return Err(refused());
            }
            axes.push(inside);
        }
        if order.next().is_some() {
            return Err(refused());
        }
        self.axes = axes;
        Ok(self)
    }

    /// For each channel its value in a constant that ONNX broadcasts over `[batch, axes..]`.
    pub fn per_channel(&self, constant: &ndarray::ArrayD<f64>) -> Result<Vec<f64>, String> {
        let refused = || {
            format!(
                "a constant of shape {:?} on {:?} behind the batch; one value, or one for each channel, is possible",
                constant.shape(),
                self.lengths()
            )
        };
        let values: Vec<f64> = constant.iter().copied().collect();
        if values.len() == 1 {
            return Ok(vec![values[0]; self.shape[0]]);
        }
        let shape = constant.shape();
        let long: Vec<usize> = (0..shape.len()).filter(|at| shape[*at] != 1).collect();
        let from_the_end = |at: usize| shape.len() - at;
        match long.as_slice() {
            [at] => {
                let axis = self.axes.len().checked_sub(from_the_end(*at));
                let axis = axis.ok_or_else(refused)?;
                match self.long_axes()[axis] == [0] && self.shape[0] == values.len() {
                    true => Ok(values),
                    false => Err(refused()),
                }
            }
            _ => Err(refused()),
        }
    }
}
