"""One tile as an electrical circuit, for those who look: its netlist, its node voltages, a picture of its IR drop."""

from gpuxbar.circuit.netlist import netlist
from gpuxbar.circuit.voltages import NodeVoltages, draw_ir_drop, node_voltages

__all__ = ["NodeVoltages", "draw_ir_drop", "netlist", "node_voltages"]
