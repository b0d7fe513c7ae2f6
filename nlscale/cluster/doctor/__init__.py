"""What is wrong with a machine, or with several nodes, and what to do about it.

Every check is a probe, which measures and judges nothing, and a judge, which is given what was
measured on all hosts and returns findings:

    environment, versions, hardware, disk, data_folder        each host by itself
    arrivals, shared_files, clocks, network (judged in links) between the hosts
    machine, nodes                                            which checks are made, in which order
    meeting                                                   how ranks meet, and talk over a store
"""
