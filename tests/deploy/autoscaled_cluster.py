"""A Ray with an application that scales from zero to two replicas, until standard input ends.

Prints the cluster's address once the application is deployed. Delays are short: reports come twice
a second, and what is idle for some seconds goes.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from headrace.deploy.autoscaling import POLICY
from headrace.deploy.build_args import BuildArgs, resources_of
from headrace.deploy.switches import set_local_switches
from headrace.listening import listen

APPLICATION = "chat"
AUTOSCALING = {
    "min_replicas": 0,
    "max_replicas": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 0,
    "look_back_period_s": 2.0,
    # Deprecated in words, but what Ray 2.60 goes by: its environment variable is read nowhere.
    "metrics_interval_s": 0.5,
    "policy": {
        "policy_function": POLICY,
        "policy_kwargs": {
            "ttft_s": 0.5,
            "tpot_s": 0.002,  # what no CPU keeps under load
            "startup_s": 5,
            "downscale_delay_s": 5,
            "idle_s": 12,
            "stale_s": 20,
        },
    },
}
# Eight streams need two replicas of four, whatever a step takes: on a busy machine three streams
# may be slower than eight, and the policy then sees that more replicas would not shorten a step.
OPTIONS = {
    "threads": 1,
    "kv_cache_memory_bytes": "256MiB",
    "max_model_len": 1024,
    "max_num_seqs": 4,
}


def main() -> None:
    set_local_switches()
    warnings.simplefilter("ignore")
    import ray
    from ray import serve

    from headrace.deploy.ray_serve import deployment

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        _temp_dir=str(Path(sys.argv[1])),
    )
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    config, options = BuildArgs.model_validate({"options": OPTIONS}).load()
    application = deployment.options(
        autoscaling_config=AUTOSCALING, ray_actor_options=resources_of(config)
    ).bind(config, options, None)
    serve.run(application, name=APPLICATION)
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
