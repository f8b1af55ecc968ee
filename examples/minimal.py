"""Train a network on handwritten digits with adam_jax, in forty lines of Flax NNX."""

import jax
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import adam_jax

tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    adam_jax.scale_by_moments(b1=0.9, b2=0.999),
    adam_jax.bias_correct(eps=1e-8),
    adam_jax.decay_weights(1e-4),
    adam_jax.scale_by_lr(optax.cosine_decay_schedule(3e-3, 600)),
)

images, labels = load_digits(return_X_y=True)  # 1,797 images of 8 × 8
x, x_test, y, y_test = train_test_split(images.astype("float32") / 16, labels, random_state=0)

rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 10, rngs=rngs))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x, y):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


for step in range(601):
    batch = jax.random.randint(jax.random.key(step), (64,), 0, len(x))
    loss = train_step(model, optimizer, x[batch], y[batch])
    if step % 100 == 0:
        accuracy = (model(x_test).argmax(axis=1) == y_test).mean()
        print(f"step {step}: loss {loss:.3f}, accuracy {accuracy:.1%}")
