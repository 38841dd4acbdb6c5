//! The float twin's gradients against finite differences of its own loss.

mod common;

use common::{seed, synthetic};
use ndarray::ArrayView2;
use trefoil_models::Network;
use trefoil_models::float::{Data, Model};
use trefoil_models::job::{Loss, TrainSpec};

fn check(layers: &str, loss: Loss, class_weights: &[f64]) {
    let text = format!("name = \"n\"\ninput = [2, 6, 7]\nclasses = 3\n{layers}");
    let network = Network::parse(&text).expect("valid");
    let seed = seed();
    let rows = synthetic(&network, 6, 0.5, seed);
    let model = Model::initial(
        &network,
        &TrainSpec {
            seed,
            loss,
            class_weights: class_weights.to_vec(),
            ..TrainSpec::default()
        },
    )
    .expect("valid");
    let images = ArrayView2::from_shape((rows.rows(), rows.row), &rows.images).expect("rows");
    let data = Data {
        images,
        labels: &rows.labels,
    };
    let gradients = model.gradients(data).expect("valid");
    // Small, so that few differences straddle a kink; not smaller, because the loss is f32 inside.
    let step = 1.0 / 2048.0;
    for (at, gradient) in gradients.layers.iter().enumerate() {
        let Some(gradient) = gradient else { continue };
        let (mut error, mut norm) = (0.0, 0.0);
        for ((i, j), analytic) in gradient.weight.indexed_iter() {
            let loss = |by: f32| {
                let mut moved = model.clone();
                if let Some(p) = &mut moved.parameters[at] {
                    p.weight[[i, j]] += by;
                }
                moved.gradients(data).expect("valid").loss
            };
            let numeric = (loss(step) - loss(-step)) / f64::from(2.0 * step);
            error += (numeric - f64::from(*analytic)).powi(2);
            norm += f64::from(*analytic).powi(2);
        }
        println!(
            "{}: relative error {:.5}",
            network.layers[at].name,
            (error / norm).sqrt()
        );
        assert!(
            error.sqrt() <= 0.03 * norm.sqrt() + 0.003,
            "{}: {error} beside {norm}",
            network.layers[at].name
        );
    }
}

#[test]
fn gradients_equal_finite_differences() {
    check(
        "[[layer]]\nkind=\"conv\"\nfilters=3\nkernel=3\nstride=[2,1]\npadding=1\n[[layer]]\nkind=\"square\"\n\
         [[layer]]\nkind=\"avg_pool\"\nwindow=2\n[[layer]]\nkind=\"dense\"\nunits=4\n\
         [[layer]]\nkind=\"poly\"\ncoefficients=[0.1,0.5,0.2,-0.1]\n[[layer]]\nkind=\"dense\"\n",
        Loss::SoftmaxCrossEntropy,
        &[],
    );
    check(
        "[[layer]]\nkind=\"conv\"\nfilters=3\nkernel=[2,3]\n[[layer]]\nkind=\"max_pool\"\nwindow=2\nstride=1\n\
         [[layer]]\nkind=\"relu\"\n[[layer]]\nkind=\"conv\"\nfilters=2\nkernel=2\n[[layer]]\nkind=\"relu\"\n\
         [[layer]]\nkind=\"global_avg_pool\"\n[[layer]]\nkind=\"dense\"\n",
        Loss::SoftmaxCrossEntropy,
        &[],
    );
    // A graph: a skip over two layers, one value read three times, channels put together, the images
    // read twice.
    check(
        "[[layer]]\nname=\"a\"\nkind=\"conv\"\nfilters=3\nkernel=3\npadding=1\n\
         [[layer]]\nkind=\"square\"\n[[layer]]\nname=\"b\"\nkind=\"conv\"\nfilters=3\nkernel=1\n\
         [[layer]]\nname=\"sum\"\nkind=\"add\"\nfrom=[\"b\",\"a\",\"a\"]\n\
         [[layer]]\nname=\"c\"\nkind=\"conv\"\nfrom=\"images\"\nfilters=2\nkernel=3\npadding=1\n\
         [[layer]]\nkind=\"concat\"\nfrom=[\"c\",\"images\",\"sum\"]\n\
         [[layer]]\nkind=\"avg_pool\"\nwindow=[3,2]\n[[layer]]\nkind=\"flatten\"\n[[layer]]\nkind=\"dense\"\n",
        Loss::default(),
        &[],
    );
    // Groups with two filters each, depthwise with a stride, dilation.
    check(
        "[[layer]]\nkind=\"conv\"\nfilters=4\nkernel=3\npadding=1\ngroups=2\n\
         [[layer]]\nkind=\"conv\"\nfilters=4\nkernel=3\ngroups=4\nstride=[2,1]\npadding=\"same\"\n\
         [[layer]]\nkind=\"conv\"\nfilters=3\nkernel=[2,3]\ndilation=[1,2]\n[[layer]]\nkind=\"dense\"\n",
        Loss::default(),
        &[],
    );
    // Normalisation behind a convolution, behind a sum, behind a dense layer; leaky ReLU and ReLU6.
    check(
        "[[layer]]\nname=\"a\"\nkind=\"conv\"\nfilters=3\nkernel=3\npadding=1\n\
         [[layer]]\nkind=\"batch_norm\"\n[[layer]]\nname=\"b\"\nkind=\"leaky_relu\"\nslope=0.25\n\
         [[layer]]\nname=\"s\"\nkind=\"add\"\nfrom=[\"a\",\"b\"]\n[[layer]]\nkind=\"batch_norm\"\n\
         [[layer]]\nkind=\"relu6\"\n[[layer]]\nkind=\"dense\"\nunits=5\n[[layer]]\nkind=\"batch_norm\"\n\
         [[layer]]\nkind=\"dense\"\n",
        Loss::default(),
        &[],
    );
    // Pools over the edges of an image, cut windows, averages of zeros too and of what is there alone.
    check(
        "[[layer]]\nkind=\"conv\"\nfilters=3\nkernel=3\npadding=1\n\
         [[layer]]\nkind=\"max_pool\"\nwindow=3\nstride=2\npadding=1\n\
         [[layer]]\nname=\"a\"\nkind=\"conv\"\nfilters=3\nkernel=2\npadding=1\n\
         [[layer]]\nname=\"b\"\nkind=\"avg_pool\"\nwindow=3\nstride=2\npadding=1\nceil_mode=true\n\
         [[layer]]\nname=\"c\"\nfrom=\"a\"\nkind=\"avg_pool\"\nwindow=[2,3]\nstride=[1,2]\n\
         padding=[1,0,0,2]\ncount_include_pad=false\n[[layer]]\nname=\"d\"\nfrom=\"a\"\nkind=\"max_pool\"\n\
         window=2\nceil_mode=true\n[[layer]]\nname=\"e\"\nkind=\"dense\"\nunits=4\n\
         [[layer]]\nname=\"f\"\nfrom=\"b\"\nkind=\"dense\"\nunits=4\n\
         [[layer]]\nname=\"g\"\nfrom=\"c\"\nkind=\"dense\"\nunits=4\n\
         [[layer]]\nkind=\"add\"\nfrom=[\"e\",\"f\",\"g\"]\n[[layer]]\nkind=\"dense\"\n",
        Loss::default(),
        &[],
    );
    // Dropout: the same masks in every evaluation of the loss.
    check(
        "[[layer]]\nkind=\"conv\"\nfilters=3\nkernel=3\n[[layer]]\nkind=\"tanh\"\n\
         [[layer]]\nkind=\"dropout\"\nrate=0.3\n[[layer]]\nkind=\"dense\"\nunits=5\n\
         [[layer]]\nkind=\"dropout\"\nrate=0.2\n[[layer]]\nkind=\"dense\"\n[[layer]]\nkind=\"log_softmax\"\n",
        Loss::default(),
        &[],
    );
    // Learnt polynomials behind a convolution, a dense layer and each other.
    check(
        "[[layer]]\nkind=\"conv\"\nfilters=3\nkernel=3\n\
         [[layer]]\nkind=\"approx_relu\"\ndegree=2\nlearnable=true\n\
         [[layer]]\nkind=\"dense\"\nunits=5\n\
         [[layer]]\nkind=\"approx_relu\"\ndegree=4\nlearnable=true\n\
         [[layer]]\nkind=\"approx_relu\"\ndegree=3\nfit=\"minimax\"\n[[layer]]\nkind=\"dense\"\n",
        Loss::default(),
        &[],
    );
    // The smooth activations.
    check(
        "[[layer]]\nkind=\"conv\"\nfilters=3\nkernel=3\n[[layer]]\nkind=\"gelu\"\n\
         [[layer]]\nkind=\"conv\"\nfilters=2\nkernel=2\n[[layer]]\nkind=\"silu\"\n\
         [[layer]]\nkind=\"dense\"\nunits=5\n[[layer]]\nkind=\"tanh\"\n\
         [[layer]]\nkind=\"dense\"\nunits=4\n[[layer]]\nkind=\"sigmoid\"\n[[layer]]\nkind=\"dense\"\n",
        Loss::default(),
        &[],
    );
}

#[test]
fn every_loss_has_the_gradient_of_its_value() {
    let dense = "[[layer]]\nkind=\"dense\"\nunits=4\n[[layer]]\nkind=\"square\"\n[[layer]]\nkind=\"dense\"\n";
    for loss in [
        Loss::SoftmaxCrossEntropy,
        Loss::BinaryCrossEntropy,
        Loss::MeanSquaredError,
    ] {
        check(dense, loss, &[]);
        check(dense, loss, &[0.5, 2.0, 1.0]);
    }
}
