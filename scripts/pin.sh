#!/bin/sh
# Print constraints for what the environment of BIN holds.   scripts/pin.sh BIN
set -eu
echo "# The versions everything is tested with; made by \`make constraints\`."
"$1/pip" freeze --exclude-editable --exclude modelyard | sed -e 's/+cpu$//' -e '/^nvidia-/d' -e '/^triton==/d'
