# dev: a checkout to work in (.venv, editable). test: what CI runs. test-fast: the tests of a change,
# in the environment that is active, under two minutes. test-all: every combination of models and
# recipes; an hour on two cores.
.PHONY: dev quickstart test test-fast test-all
dev:
	bash scripts/dev.sh
quickstart:
	bash scripts/quickstart.sh
test:
	bash scripts/test.sh
test-fast:
	python -m pytest --numprocesses auto --dist worksteal -m unit
test-all:
	bash scripts/test.sh --whole --stress-steps 1000
