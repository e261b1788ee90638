# The jobs people run by hand; everything else is plain cargo.
.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu-bundle clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## compress a long prompt with the model that ships here, on the GPU where there is one
	if command -v python3 >/dev/null; then tools/setup-toolchain --if-gpu; fi
	tools/demo

test: ## compile every kernel and run every test; GPU tests show as ignored where there is no GPU
	tools/setup-toolchain
	cargo check --no-default-features
	FASTKV_CUDA=require cargo test --features bindgen

bench: ## measure on this machine
	cargo bench

gpu-bundle: ## one folder that tests and measures on a GPU host without a toolchain
	tools/setup-toolchain
	tools/gpu-bundle

clean: ## remove build outputs and the downloaded toolchain
	cargo clean
	rm -rf .toolchain
