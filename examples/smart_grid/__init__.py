"""A power grid that remembers: one agent a subnet forecasts its next six hours from the days most like the last.

    grid       SimBench's tables as plain buses, loads, lines, transformers
    supply     which bus is fed through which element, and from which transformer
    profiles   each subnet's demand, cut into days of 96 quarter-hours
    documents  all of that as entities, edges and vectors
    loading    documents into the mesh, several requests in flight
    forecast   a morning from similar days, and how wrong a forecast was
    agents     the decision loop of one subnet
    deciding   agents that take turns at a steady rate
    substations  parts of the grid with a device of their own, and an account of what they wrote
    report     the tables, the picture and the JSON
    demo       the whole story, and its flags

Looks at the SDK only: which mesh it talks to, and what its devices are, is decided by whoever calls `demo.run`.
"""
