# Sourced by scripts that run on machines where nothing can be installed, in the checkout's folder:
# if Python finds no lvlm, it finds this checkout, by the links of an editable install (setup.py).
export PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import lvlm.plugins_trt' 2> /dev/null; then
    "$PYTHON" setup.py --quiet links || exit 2
    export PYTHONPATH="$PWD/.editable${PYTHONPATH:+:$PYTHONPATH}"
fi
