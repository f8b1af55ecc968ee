"""Train a network on handwritten digits with adam_jax, in forty lines of Equinox."""

import equinox as eqx
import jax
import optax
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

model = eqx.nn.MLP(64, 10, width_size=128, depth=1, key=jax.random.key(0))
state = tx.init(eqx.filter(model, eqx.is_array))


@eqx.filter_jit
def train_step(model, state, x, y):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()

    loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, loss


for step in range(601):
    batch = jax.random.randint(jax.random.key(step), (64,), 0, len(x))
    model, state, loss = train_step(model, state, x[batch], y[batch])
    if step % 100 == 0:
        accuracy = (jax.vmap(model)(x_test).argmax(axis=1) == y_test).mean()
        print(f"step {step}: loss {loss:.3f}, accuracy {accuracy:.1%}")
